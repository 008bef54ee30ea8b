"""Pass: what no class covers yet runs as PyTorch before the fused part.

Before: decay = cumsum[t](log_f) inside the graph. After: ``decay`` is an input of the fused graph, and its equation is in ``outside``.
"""

from __future__ import annotations

from . import ir
from .algebra import substitute


def split_outside(graph: ir.Graph, *, selects: bool = False) -> tuple[dict[str, ir.Node] | None, dict[str, ir.Node], list[str]]:
    """(outputs of the fused part or None, outside values by name, reasons). ``selects``: selections and counts are part of the plan."""
    nodes = list(ir.topological(graph.outputs.values()))
    hosts = [frozenset(n.axes) for n in nodes if isinstance(n, ir.Input)] + [frozenset(t.axes) for t in graph.kernel.outputs]
    tainted: set[ir.Node] = set()
    chosen: dict[ir.Node, str] = {}
    reasons: list[str] = []
    read = {n.x for n in nodes if isinstance(n, ir.Read)}
    taken = {t.name for t in (*graph.kernel.inputs, *graph.kernel.outputs)}
    for n in nodes:
        bad = None if selects and is_library(n) else _uncovered(n)
        if not bad and not any(c in tainted for c in ir.children(n)):
            continue
        storable = any(set(n.axes) <= h for h in hosts) or n in read
        if storable and (bad or n in read):
            chosen[n] = _name(graph, n, taken)
            reasons.append(f"{chosen[n]} runs as PyTorch before the fused part: {bad or 'it rests on such a value'}")
        else:
            tainted.add(n)
            if bad:
                reasons.append(f"the kernel runs as the reference: {bad}, over {', '.join(n.axes)}, which no tensor could hold")
    if any(o in tainted or o in chosen for o in graph.outputs.values()):
        if not any("runs as the reference" in r for r in reasons):
            reasons.append("the kernel runs as the reference: an output rests on a value that no fused class covers")
        return None, {}, reasons
    replacement: dict[ir.Node, ir.Node] = {n: ir.make(ir.Input, n.axes, n.kind, name) for n, name in chosen.items()}
    outputs = {name: substitute(n, replacement) for name, n in graph.outputs.items()}
    left = set(ir.topological(outputs.values()))
    outside = {name: n for n, name in chosen.items() if replacement[n] in left}
    return outputs, outside, [r for r in reasons if any(r.startswith(f"{name} ") for name in outside)]


def is_library(n: ir.Node) -> bool:
    """What PyTorch makes between kernels: selections, and running sums of whole numbers."""
    return isinstance(n, ir.Select) or (isinstance(n, ir.Scan) and n.kind != "real")


def _uncovered(n: ir.Node) -> str | None:
    """Why no fused class of today computes this node; None if one does."""
    match n:
        case ir.Scan(op=op):
            return f"a scan ({op})"
        case ir.Select():
            return "a selection (topk)"
        case ir.StateValue(name=name):
            return f"a state ({name})"
        case ir.Reduce(op="prod"):
            return "a reduction by prod"
        case ir.Read(at=at) if any(_depends_on_values(e) for _, e in at):
            return "a gather at a position computed from values"
        case _:
            return None


def _depends_on_values(position: ir.Node) -> bool:
    return any(isinstance(n, ir.Input) and n.kind == "real" for n in ir.topological([position]))


def _name(graph: ir.Graph, n: ir.Node, taken: set[str]) -> str:
    match n:
        case ir.StateValue(name=state):
            fallback = f"{state}_{n.version}"
        case ir.Select():
            fallback = "selected"
        case ir.Scan(op=op):
            fallback = f"{op}_over_{n.axis}"
        case _:
            fallback = "value"
    name = graph.names.get(n, fallback)
    while name in taken:
        name += "_"
    taken.add(name)
    return name
