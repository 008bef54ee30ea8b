"""Integer expressions as sums of multiples of atoms: what loop bounds and inverses of reads are solved in."""

from __future__ import annotations

from dataclasses import dataclass

from . import ir


@dataclass(frozen=True, slots=True)
class Affine:
    """``constant + sum of coefficient * atom``; an atom is any int node that is not itself a sum."""

    terms: dict[ir.Node, int]
    constant: int

    def plus(self, other: Affine) -> Affine:
        merged = dict(self.terms)
        for atom, c in other.terms.items():
            merged[atom] = merged.get(atom, 0) + c
        return Affine({a: c for a, c in merged.items() if c}, self.constant + other.constant)

    def times(self, factor: int) -> Affine:
        return Affine({a: c * factor for a, c in self.terms.items() if c * factor}, self.constant * factor)

    def minus(self, other: Affine) -> Affine:
        return self.plus(other.times(-1))

    def node(self) -> ir.Node:
        """The expression again; positive terms first, so that it reads well."""
        result: ir.Node | None = None
        for atom, c in sorted(self.terms.items(), key=lambda item: item[1] < 0):
            part = atom if abs(c) == 1 else ir.pointwise("mul", ir.const(abs(c)), atom)
            if result is None:
                result = part if c > 0 else ir.pointwise("neg", part)
            else:
                result = ir.pointwise("add" if c > 0 else "sub", result, part)
        if result is None:
            return ir.const(self.constant)
        if self.constant:
            op = "add" if self.constant > 0 else "sub"
            result = ir.pointwise(op, result, ir.const(abs(self.constant)))
        return result


def affine(node: ir.Node) -> Affine:
    match node:
        case ir.Const(value=value) if node.kind == "int":
            return Affine({}, int(value))
        case ir.Pointwise(op="add", args=(a, b)) if node.kind == "int":
            return affine(a).plus(affine(b))
        case ir.Pointwise(op="sub", args=(a, b)) if node.kind == "int":
            return affine(a).minus(affine(b))
        case ir.Pointwise(op="neg", args=(a,)) if node.kind == "int":
            return affine(a).times(-1)
        case ir.Pointwise(op="mul", args=(a, b)) if node.kind == "int":
            left, right = affine(a), affine(b)
            if not left.terms:
                return right.times(left.constant)
            if not right.terms:
                return left.times(right.constant)
            return Affine({node: 1}, 0)
        case _:
            return Affine({node: 1}, 0)
