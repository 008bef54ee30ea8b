"""The operations of the reference evaluator: PyTorch on named axes, with the language's gradients.

A ``Value`` is a tensor with one dimension for each of its axes, in sorted order and in full extent. Two rules of the
language differ from PyTorch's and are kept here:

* What receives no gradient passes none, however singular the formula is there: 0 * inf is 0 in a backward pass.
* A masked number is never read: it is replaced before anything is summed, so that NaN * 0 does not arise.

Numbers without a floating input (positions, sizes, literals, params) are as precise as the evaluation is, or float32
where that is in half precision; each operation in half precision computes in float32 and rounds its result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import errors

HALF = (torch.float16, torch.bfloat16)
LARGE_PRODUCT = 2**24
"""Products with fewer elements are written out where a factor is not finite; larger ones would not fit in memory."""
INT_INF = 2**63 - 1
"""Stands for inf where a minimum of ints ranges over nothing; its negative for -inf."""


class Value(NamedTuple):
    data: Tensor
    axes: tuple[str, ...]


class Setting(NamedTuple):
    """What every operation may need to know: extents and origins of axes, the device, and the dtype of computed numbers."""

    extents: Mapping[str, int]
    origin: Mapping[str, int]
    device: torch.device
    wide: torch.dtype


def union(values: Iterable[Value | None], more: Iterable[str] = ()) -> tuple[str, ...]:
    return tuple(sorted({a for v in values if v is not None for a in v.axes}.union(more)))


def align(value: Value, axes: tuple[str, ...]) -> Tensor:
    """The tensor with one dimension for each of ``axes`` (sorted), of extent 1 where it lacks the axis."""
    if value.axes == axes:
        return value.data
    return value.data[tuple(slice(None) if a in value.axes else None for a in axes)]


def expand(value: Value, axes: tuple[str, ...], setting: Setting) -> Tensor:
    """The tensor with all of ``axes`` (sorted) in full extent; nothing is copied."""
    return align(value, axes).expand([setting.extents[a] for a in axes])


# dtypes -------------------------------------------------------------------------------------------------------------


def number(value: Value) -> Value:
    """A bool counts as 0 or 1."""
    return Value(value.data.long(), value.axes) if value.data.dtype == torch.bool else value


def real(value: Value, wide: torch.dtype) -> Value:
    """As floating point: a scalar that was not is exact, as a Python number is."""
    if value.data.is_floating_point():
        return value
    return Value(value.data.to(wide if value.axes else torch.float64), value.axes)


def common_dtype(values: Sequence[Value], wide: torch.dtype) -> torch.dtype:
    """The promoted dtype of real values; scalars do not promote what has axes."""
    dtypes = [v.data.dtype for v in values if v.axes] or [v.data.dtype for v in values]
    return reduce(torch.promote_types, dtypes)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in HALF else dtype


# Pointwise operations with quiet gradients ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """A value and, for every argument, the gradient ``f(g, out, *args)``."""

    value: Callable[..., Tensor]
    gradients: tuple[Callable[..., Tensor], ...]


def surely_finite(x: Tensor) -> bool:
    """Whether a sum of all numbers is finite: then all are. One pass; an overflow only makes it too careful."""
    return math.isfinite(x.detach().sum(dtype=at_least_float32(x.dtype)))


def quiet(g: Tensor, gradient: Tensor) -> Tensor:
    """``gradient``, but 0 where nothing (``g`` = 0) was to be passed on."""
    return gradient if surely_finite(gradient) else torch.where(g == 0, 0.0, gradient)


class _Quiet(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rule: Rule, *args: Tensor) -> Tensor:
        out = rule.value(*args)
        ctx.rule = rule
        ctx.save_for_backward(*args, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        *args, out = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:]
        return None, *(quiet(g, f(g, out, *args)) if n else None for f, n in zip(ctx.rule.gradients, needed, strict=True))


def apply(rule: Rule, *args: Tensor) -> Tensor:
    """The rule on broadcast arguments of one dtype."""
    if not (torch.is_grad_enabled() and any(a.requires_grad for a in args)):
        return rule.value(*args)
    result: Tensor = _Quiet.apply(rule, *broadcast(args))  # type: ignore[no-untyped-call]
    return result


def broadcast(args: Sequence[Tensor]) -> list[Tensor]:
    """The tensors in their common shape."""
    shape = torch.broadcast_shapes(*(a.shape for a in args))  # type: ignore[no-untyped-call]
    return [a.expand(shape) for a in args]


def _expdiff(x: Tensor, y: Tensor) -> Tensor:
    return _weight(x - y, x)


def _weight(difference: Tensor, x: Tensor) -> Tensor:
    """exp of a difference from ``x``, which is 0 where ``x`` is -inf."""
    weight = torch.exp(difference)
    return weight if surely_finite(weight) else torch.where(x == -math.inf, 0.0, weight)


def expdiff(x: Tensor, y: Tensor) -> Tensor:
    """exp(x - y), and 0 with no gradient where ``x`` is -inf."""
    score = x.detach()
    return apply(Rule(lambda d: _weight(d, score), (lambda g, out, d: g * out,)), x - y)


def _power_base(g: Tensor, out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b == 0, 0.0, g * b * a ** (b - 1))


def _power_exponent(g: Tensor, out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where((a == 0) & (b >= 0), 0.0, g * out * torch.log(a))


def _gelu_gradient(g: Tensor, out: Tensor, x: Tensor) -> Tensor:
    return g * (0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * torch.exp(-x * x / 2) / math.sqrt(2 * math.pi))


def _gelu_tanh_gradient(g: Tensor, out: Tensor, x: Tensor) -> Tensor:
    scale = math.sqrt(2 / math.pi)
    t = torch.tanh(scale * (x + 0.044715 * x**3))
    return g * (0.5 * (1 + t) + 0.5 * x * (1 - t * t) * scale * (1 + 3 * 0.044715 * x * x))


def _logsigmoid(x: Tensor) -> Tensor:
    return torch.nn.functional.logsigmoid(x)


def _silu_gradient(g: Tensor, out: Tensor, x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return g * s * (1 + x * (1 - s))


RULES: dict[str, Rule] = {
    "mul": Rule(torch.mul, (lambda g, out, a, b: g * b, lambda g, out, a, b: g * a)),
    "div": Rule(torch.div, (lambda g, out, a, b: g / b, lambda g, out, a, b: -g * out / b)),
    "mod": Rule(torch.remainder, (lambda g, out, a, b: g, lambda g, out, a, b: -g * torch.floor(a / b))),
    "pow": Rule(torch.pow, (_power_base, _power_exponent)),
    "exp": Rule(torch.exp, (lambda g, out, x: g * out,)),
    "log": Rule(torch.log, (lambda g, out, x: g / x,)),
    "log1p": Rule(torch.log1p, (lambda g, out, x: g / (1 + x),)),
    "expm1": Rule(torch.expm1, (lambda g, out, x: g * (out + 1),)),
    "sqrt": Rule(torch.sqrt, (lambda g, out, x: g / (2 * out),)),
    "rsqrt": Rule(torch.rsqrt, (lambda g, out, x: -0.5 * g * out / x,)),
    "abs": Rule(torch.abs, (lambda g, out, x: g * torch.sign(x),)),
    "sin": Rule(torch.sin, (lambda g, out, x: g * torch.cos(x),)),
    "cos": Rule(torch.cos, (lambda g, out, x: -g * torch.sin(x),)),
    "tanh": Rule(torch.tanh, (lambda g, out, x: g * (1 - out * out),)),
    "sigmoid": Rule(torch.sigmoid, (lambda g, out, x: g * out * (1 - out),)),
    "logsigmoid": Rule(_logsigmoid, (lambda g, out, x: g * torch.sigmoid(-x),)),
    "softplus": Rule(lambda x: -_logsigmoid(-x), (lambda g, out, x: g * torch.sigmoid(x),)),
    "relu": Rule(torch.relu, (lambda g, out, x: torch.where(x > 0, g, 0.0),)),
    "silu": Rule(torch.nn.functional.silu, (_silu_gradient,)),
    "gelu": Rule(torch.nn.functional.gelu, (_gelu_gradient,)),
    "gelu_tanh": Rule(lambda x: torch.nn.functional.gelu(x, approximate="tanh"), (_gelu_tanh_gradient,)),
    "erf": Rule(torch.erf, (lambda g, out, x: g * torch.exp(-x * x) * (2 / math.sqrt(math.pi)),)),
    "logaddexp": Rule(torch.logaddexp, (lambda g, out, a, b: g * _expdiff(a, out), lambda g, out, a, b: g * _expdiff(b, out))),
}

_clip_rule = Rule(lambda x, c: x.clone(), (lambda g, out, x, c: torch.clamp(g, -c, c), lambda g, out, x, c: torch.zeros_like(g)))


def _max(a: Tensor, b: Tensor) -> Tensor:
    return torch.where((a >= b) | torch.isnan(a), a, b)


def _min(a: Tensor, b: Tensor) -> Tensor:
    return torch.where((a <= b) | torch.isnan(a), a, b)


def _clamp(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    raised = torch.where(x < low, low, x)
    return torch.where(raised > high, high, raised)


PLAIN: dict[str, Callable[..., Tensor]] = {
    "add": torch.add, "sub": torch.sub, "neg": torch.neg, "min": _min, "max": _max, "clamp": _clamp,
    "lt": torch.lt, "le": torch.le, "gt": torch.gt, "ge": torch.ge, "eq": torch.eq, "ne": torch.ne,
}  # fmt: skip
"""Operations that PyTorch differentiates as the language does, on ints and on reals."""


def _int_power(a: Tensor, b: Tensor) -> Tensor:
    if bool((b < 0).any()):
        raise errors.NegativePower
    return torch.pow(a, b)


def _unless_zero(operation: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """An int division that gives 0 for a divisor of 0, where PyTorch would raise even though the number is masked."""
    return lambda a, b: torch.where(b == 0, 0, operation(a, torch.where(b == 0, 1, b)))


INT_ONLY: dict[str, Callable[..., Tensor]] = {
    "mul": torch.mul, "floordiv": _unless_zero(torch.floor_divide), "mod": _unless_zero(torch.remainder), "pow": _int_power,
    "abs": torch.abs, "sign": torch.sign, "relu": torch.relu, "clipgrad": lambda x, c: broadcast((x, c))[0],
}  # fmt: skip

ROUND: dict[str, Callable[..., Tensor]] = {"floor": torch.floor, "ceil": torch.ceil, "round": torch.round}


def _to_int(x: Tensor) -> Tensor:
    """Whole reals as ints; what no int can hold saturates and NaN is 0, since a masked position may hold anything."""
    return torch.nan_to_num(x.detach(), nan=0.0).clamp(-(2.0**62), 2.0**62).long()


def pointwise(op: str, args: Sequence[Value], setting: Setting) -> Value:
    """One of ``dsl.typed.POINTWISE`` or ``ir.DERIVED_POINTWISE`` on broadcast values."""
    axes = union(args)
    match op:
        case "and":
            return Value(torch.logical_and(*(align(a, axes) for a in args)), axes)
        case "or":
            return Value(torch.logical_or(*(align(a, axes) for a in args)), axes)
        case "not":
            return Value(torch.logical_not(args[0].data), axes)
        case "stopgrad":
            return Value(args[0].data.detach(), axes)
        case "where":
            return _where(args, axes, setting)
        case _:
            pass
    args = [number(a) for a in args]
    if any(a.data.is_floating_point() for a in args):
        return _on_reals(op, args, axes, setting)
    if op in PLAIN or op in INT_ONLY:
        operation = PLAIN.get(op) or INT_ONLY[op]
        return Value(operation(*(align(a, axes) for a in args)), axes)
    return args[0] if op in ROUND else _on_reals(op, args, axes, setting)


def _where(args: Sequence[Value], axes: tuple[str, ...], setting: Setting) -> Value:
    condition, *branches = args
    if any(b.data.dtype != torch.bool for b in branches):
        branches = [number(b) for b in branches]
    if any(b.data.is_floating_point() for b in branches):
        branches = [real(b, setting.wide) for b in branches]
        dtype = common_dtype(branches, setting.wide)
        branches = [Value(b.data.to(dtype), b.axes) for b in branches]
    yes, no = (align(b, axes) for b in branches)
    return Value(torch.where(align(condition, axes), yes, no), axes)


def _on_reals(op: str, args: Sequence[Value], axes: tuple[str, ...], setting: Setting) -> Value:
    args = [real(a, setting.wide) for a in args]
    # A softmax weight has its score's dtype, as in PyTorch, although the normaliser is kept in float32.
    dtype = args[0].data.dtype if op == "expdiff" and args[0].axes else common_dtype(args, setting.wide)
    compute = at_least_float32(common_dtype(args, setting.wide))
    tensors = [align(Value(a.data.to(compute), a.axes), axes) for a in args]
    if op in ("mul", "div", "pow") and not args[1].axes and not args[1].data.requires_grad:
        return Value(_with_scalar(op, tensors[0], float(args[1].data)).to(dtype), axes)
    if op == "expdiff":
        return Value(expdiff(*tensors).to(dtype), axes)
    if op in RULES:
        return Value(apply(RULES[op], *tensors).to(dtype), axes)
    if op in ROUND:
        return Value(_to_int(ROUND[op](tensors[0])), axes)
    if op == "floordiv":
        return Value(_to_int(torch.floor(tensors[0] / tensors[1])), axes)
    if op == "sign":
        return Value(torch.sign(tensors[0].detach()).to(dtype), axes)
    if op == "clipgrad":
        return Value(apply(_clip_rule, *broadcast(tensors)).to(dtype), axes)
    result = PLAIN[op](*tensors)
    return Value(result if result.dtype == torch.bool else result.to(dtype), axes)


def _with_scalar(op: str, x: Tensor, scalar: float) -> Tensor:
    """``x`` and a number without a gradient; a plain product or quotient cannot turn a gradient of 0 into NaN."""
    if op == "pow":
        gradient = lambda g, out, a: g * scalar * a ** (scalar - 1) if scalar else torch.zeros_like(g)  # noqa: E731
        return apply(Rule(lambda a: a**scalar, (gradient,)), x)
    if math.isfinite(scalar) and (op == "mul" or scalar != 0):
        return x * scalar if op == "mul" else x / scalar
    return apply(RULES[op], x, torch.tensor(scalar, dtype=x.dtype, device=x.device))


# Reductions -----------------------------------------------------------------------------------------------------------


def spread(
    x: Value, where: Value | None, over: Sequence[str], identity: float | bool, setting: Setting
) -> tuple[Tensor, Tensor | None, tuple[str, ...]]:
    """``x`` with ``over`` flattened into a last dimension and ``identity`` where masked; the condition alike; the kept axes."""
    axes = union((x, where), over)
    kept = tuple(a for a in axes if a not in over)
    data = _flat(expand(x, axes, setting), axes, over)
    if where is None:
        return data, None, kept
    condition = _flat(expand(where, axes, setting), axes, over)
    return torch.where(condition, data, torch.tensor(identity, dtype=data.dtype, device=data.device)), condition, kept


def _flat(data: Tensor, axes: tuple[str, ...], over: Sequence[str]) -> Tensor:
    order = [n for n, a in enumerate(axes) if a not in over] + [n for n, a in enumerate(axes) if a in over]
    kept = len(axes) - len(over)
    data = data.permute(order)
    return data.reshape(*data.shape[:kept], math.prod(data.shape[kept:]))


def _infinity(dtype: torch.dtype) -> float | int:
    return math.inf if dtype.is_floating_point else INT_INF


def reduce_over(op: str, over: Sequence[str], x: Value, where: Value | None, setting: Setting) -> Value:
    """A reduction of ``ir.Reduce`` over the positions of ``over`` where ``where`` holds."""
    if op in ("any", "all"):
        truth = Value(x.data != 0, x.axes) if x.data.dtype != torch.bool else x
        data, _, kept = spread(truth, where, over, op == "all", setting)
        return Value(data.any(-1) if op == "any" else data.all(-1), kept)
    x = number(x)
    match op:
        case "sum":
            return masked_sum(x, where, over, setting)
        case "prod":
            data, _, kept = spread(x, where, over, 1, setting)
            return Value(data.prod(-1), kept)
        case "max":
            data, _, kept = spread(x, where, over, -_infinity(x.data.dtype), setting)
            return Value(_largest(data), kept)
        case "min":
            data, _, kept = spread(x, where, over, _infinity(x.data.dtype), setting)
            return Value(-_largest(-data), kept)
        case "argmax":
            return _argmax(x, where, over, setting)
        case "lse":
            x = real(x, setting.wide)
            x = Value(x.data.to(at_least_float32(x.data.dtype)), x.axes)
            data, _, kept = spread(x, where, over, -math.inf, setting)
            return Value(logsumexp(data), kept)
        case _:
            raise AssertionError(f"not a reduction: {op}")


def masked_sum(x: Value, where: Value | None, over: Sequence[str], setting: Setting) -> Value:
    axes = union((x, where))
    data = align(x, axes)
    if where is not None:
        data = torch.where(align(where, axes), data, 0)
    dims = [n for n, a in enumerate(axes) if a in over]
    repeats = math.prod(setting.extents[a] for a in over if a not in axes)
    total = data.sum(dims) if dims else data
    return Value(total if repeats == 1 else total * repeats, tuple(a for a in axes if a not in over))


def _largest(data: Tensor) -> Tensor:
    """The maximum along the last dimension; the first of equals gets the gradient, and none does where all are -inf."""
    nothing = -_infinity(data.dtype)
    if data.shape[-1] == 0:
        return data.new_full(data.shape[:-1], nothing)
    value = data.max(-1).values
    return torch.where(value == nothing, nothing, value)


def _argmax(x: Value, where: Value | None, over: Sequence[str], setting: Setting) -> Value:
    """The position of the first maximum; the position before the first where there is nothing to choose from."""
    data, _, kept = spread(x, where, over, -_infinity(x.data.dtype), setting)
    first = sum(setting.origin.get(a, 0) for a in over)
    if data.shape[-1] == 0:
        return Value(torch.full(data.shape[:-1], first - 1, device=data.device), kept)
    value, index = data.detach().max(-1)
    return Value(torch.where(value == -_infinity(data.dtype), -1, index) + first, kept)


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = torch.logsumexp(x, -1)
        ctx.save_for_backward(x, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        x, out = ctx.saved_tensors
        g = g.unsqueeze(-1)
        return quiet(g, g * _expdiff(x, out.unsqueeze(-1)))


def logsumexp(x: Tensor) -> Tensor:
    """Along the last dimension; -inf, and no gradient, where all are -inf."""
    if x.shape[-1] == 0:
        return x.new_full(x.shape[:-1], -math.inf)
    result: Tensor = _LogSumExp.apply(x)  # type: ignore[no-untyped-call]
    return result


# Contractions ---------------------------------------------------------------------------------------------------------


def sum_of_product(factors: Sequence[Value], where: Value | None, over: Sequence[str], setting: Setting, restricted: bool = False) -> Value:
    """The sum of a product over ``over`` where ``where`` holds, by matrix products if that cannot change its meaning.

    ``restricted`` says that one of the factors is 0 already where it does not hold.
    """
    fast = _contraction(factors, where, over, setting, restricted)
    if fast is not None:
        return fast
    product = reduce(lambda a, b: pointwise("mul", (a, b), setting), map(number, factors))
    return masked_sum(product, where, over, setting)


def _contraction(factors: Sequence[Value], where: Value | None, over: Sequence[str], setting: Setting, restricted: bool) -> Value | None:
    """None where all factors have the same axes, where they are ints, or where the numbers do not allow it.

    Matrix products multiply masked numbers by 0 instead of leaving them out, so all numbers must be finite. What is not
    is taken out, and where it was wanted the sum is NaN; below ``LARGE_PRODUCT`` the product is rather written out,
    which tells inf from NaN.
    """
    operands = [f for f in factors if f.axes]
    scalars = [f for f in factors if not f.axes]
    whole = union((*operands, where))
    if not any(f.data.is_floating_point() for f in operands) or all(f.axes == whole for f in operands):
        return None
    dtype = _operand_dtype(operands, setting.wide)
    operands = [Value(f.data.to(dtype), f.axes) for f in operands]
    if where is not None and not restricted:
        operands = _restrict(operands, where, dtype)
    if not all(surely_finite(f.data) for f in scalars):
        return None
    spoilt = None
    if not all(surely_finite(f.data) for f in operands):
        if math.prod(setting.extents[a] for a in whole) < LARGE_PRODUCT:
            return None
        spoilt = _spoilt(operands, where, over)
        operands = [Value(torch.where(torch.isfinite(f.data), f.data, 0.0), f.axes) for f in operands]
    absent = math.prod(setting.extents[a] for a in over if a not in whole)
    result = _contract(operands, over)
    if absent != 1:
        result = Value(result.data * absent, result.axes)
    if spoilt is not None:
        result = Value(torch.where(align(spoilt, result.axes), math.nan, result.data), result.axes)
    return reduce(lambda a, b: pointwise("mul", (a, b), setting), map(number, scalars), result)


def _spoilt(operands: Sequence[Value], where: Value | None, over: Sequence[str]) -> Value:
    """Where a sum has a kept element with a factor that is not finite."""
    found: Value | None = None
    for f in operands:
        terms = [Value((~torch.isfinite(f.data)).float(), f.axes)]
        if where is not None:
            terms.append(Value(where.data.float(), where.axes))
        hit = _contract(terms, over)
        axes = union((hit, found))
        mark = align(Value(hit.data > 0, hit.axes), axes)
        found = Value(mark if found is None else mark | align(found, axes), axes)
    assert found is not None
    return found


def _operand_dtype(operands: Sequence[Value], wide: torch.dtype) -> torch.dtype:
    """Half precision if an operand has it, as under autocast; but ints, which it cannot hold, need more."""
    half = [f.data.dtype for f in operands if f.data.dtype in HALF]
    if half and not any(f.data.dtype == torch.int64 for f in operands):
        return reduce(torch.promote_types, half)
    return common_dtype([real(f, wide) for f in operands], wide)


def _restrict(operands: list[Value], where: Value, dtype: torch.dtype) -> list[Value]:
    """The operands with the condition in one that has all of its axes, or as one more factor."""
    for n, f in enumerate(operands):
        if set(where.axes) <= set(f.axes):
            masked = Value(torch.where(align(where, f.axes), f.data, 0.0), f.axes)
            return [*operands[:n], masked, *operands[n + 1 :]]
    return [*operands, Value(where.data.to(dtype), where.axes)]


def _contract(operands: list[Value], over: Sequence[str]) -> Value:
    """Pairwise contraction, smallest result first."""
    while True:
        operands = [_sum_own(n, operands, over) for n in range(len(operands))]
        if len(operands) == 1:
            return operands[0]
        a, b = min(((a, b) for n, a in enumerate(operands) for b in operands[n + 1 :]), key=lambda pair: _pair_cost(pair, operands, over))
        rest = [f for f in operands if f is not a and f is not b]
        operands = [*rest, _contract_pair(a, b, _pair_axes((a, b), rest, over))]


def _sum_own(n: int, operands: list[Value], over: Sequence[str]) -> Value:
    """Operand ``n`` summed over the reduced axes that no other operand has."""
    f = operands[n]
    others = union(operands[:n] + operands[n + 1 :])
    own = [a for a in f.axes if a in over and a not in others]
    return _sum_out(f, own) if own else f


def _sum_out(f: Value, over: Sequence[str]) -> Value:
    dims = [f.axes.index(a) for a in over]
    return Value(f.data.sum(dims), tuple(a for a in f.axes if a not in over))


def _pair_axes(pair: tuple[Value, Value], rest: Sequence[Value], over: Sequence[str]) -> tuple[str, ...]:
    needed = union(rest)
    return tuple(a for a in union(pair) if a not in over or a in needed)


def _pair_cost(pair: tuple[Value, Value], operands: Sequence[Value], over: Sequence[str]) -> int:
    rest = [f for f in operands if f is not pair[0] and f is not pair[1]]
    extents = {a: n for f in pair for a, n in zip(f.axes, f.data.shape, strict=True)}
    return math.prod(extents[a] for a in _pair_axes(pair, rest, over))


def _contract_pair(a: Value, b: Value, out: tuple[str, ...]) -> Value:
    letter = {axis: chr(ord("a") + n) for n, axis in enumerate(union((a, b)))}
    terms = ["".join(letter[axis] for axis in axes) for axes in (a.axes, b.axes, out)]
    return Value(torch.einsum(f"{terms[0]},{terms[1]}->{terms[2]}", a.data, b.data), out)


# Scans ----------------------------------------------------------------------------------------------------------------


class _LogCumSumExp(torch.autograd.Function):
    """Along the last dimension. A prefix that is all -inf receives and passes no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = torch.logcumsumexp(x, -1)
        ctx.save_for_backward(x, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        x, out = ctx.saved_tensors
        # sum over t >= j of g[t] exp(x[j] - out[t]), in logs and by the sign of g so that nothing overflows.
        parts = []
        for part in (g.clamp(min=0), (-g).clamp(min=0)):
            logs = torch.where((part == 0) | (out == -math.inf), -math.inf, torch.log(part) - out)
            total = torch.logcumsumexp(logs.flip(-1), -1).flip(-1)
            parts.append(torch.where((x == -math.inf) | (total == -math.inf), 0.0, torch.exp(x + total)))
        return parts[0] - parts[1]


def _cummax(x: Tensor, reverse: bool) -> Tensor:
    """Along the last dimension in the order of the scan; of equals, the one at the lower position gets the gradient."""
    nothing = -_infinity(x.dtype)
    top = x.detach().cummax(-1).values
    before = torch.cat([top.new_full((*top.shape[:-1], 1), nothing), top[..., :-1]], -1)
    raised = (x.detach() >= before) if reverse else (x.detach() > before)
    raised[..., 0] = True
    here = torch.arange(x.shape[-1], device=x.device).expand(x.shape)
    source = torch.where(raised, here, 0).cummax(-1).values
    value = x.gather(-1, source)
    return torch.where(top == nothing, nothing, value)


def scan(op: str, axis: str, x: Value, where: Value | None, reverse: bool, exclusive: bool, setting: Setting) -> Value:
    """A running reduction along ``axis``; masked positions are skipped and show the running value."""
    x = number(x)
    if op == "cumlse":
        x = real(x, setting.wide)
    x = Value(x.data.to(at_least_float32(x.data.dtype)), x.axes)
    identity: float = {"cumsum": 0, "cumprod": 1, "cummax": -_infinity(x.data.dtype), "cumlse": -math.inf}[op]
    data, _, kept = spread(x, where, (axis,), identity, setting)
    if data.shape[-1]:
        data = _running(op, data.flip(-1) if reverse else data, reverse)
        if exclusive:
            data = torch.cat([data.new_full((*data.shape[:-1], 1), identity), data[..., :-1]], -1)
        data = data.flip(-1) if reverse else data
    axes = tuple(sorted((*kept, axis)))
    return Value(data.movedim(-1, axes.index(axis)), axes)


def _running(op: str, data: Tensor, reverse: bool) -> Tensor:
    match op:
        case "cumsum":
            return data.cumsum(-1)
        case "cumprod":
            return data.cumprod(-1)
        case "cummax":
            return _cummax(data, reverse)
        case "cumlse":
            result: Tensor = _LogCumSumExp.apply(data)  # type: ignore[no-untyped-call]
            return result
        case _:
            raise AssertionError(f"not a scan: {op}")


# Reads and selections -------------------------------------------------------------------------------------------------


def rename(x: Value, old: str, new: str) -> Value:
    axes = tuple(new if a == old else a for a in x.axes)
    order = sorted(range(len(axes)), key=lambda n: axes[n])
    return Value(x.data.permute(order), tuple(sorted(axes)))


def read(x: Value, at: Sequence[tuple[str, Value]], setting: Setting) -> Value:
    """``x`` at int positions along the axes of ``at``, which it has; 0 or False outside of their extents."""
    at = [(a, Value(e.data - setting.origin.get(a, 0), e.axes)) for a, e in at]
    if len(at) == 1:
        axis, index = at[0]
        if not index.axes:
            return _read_one(x, axis, int(index.data))
        if len(index.axes) == 1 and index.axes[0] not in (a for a in x.axes if a != axis):
            shifted = _read_run(x, axis, index)
            if shifted is not None:
                return shifted
    return _gather(x, at, setting)


def _read_one(x: Value, axis: str, position: int) -> Value:
    dim = x.axes.index(axis)
    axes = tuple(a for a in x.axes if a != axis)
    if 0 <= position < x.data.shape[dim]:
        return Value(x.data.select(dim, position), axes)
    return Value(x.data.new_zeros([n for d, n in enumerate(x.data.shape) if d != dim]), axes)


def _read_run(x: Value, axis: str, index: Value) -> Value | None:
    """A read at consecutive positions, as a slice between zeros; None for others."""
    wanted, dim = index.data.shape[0], x.axes.index(axis)
    extent = x.data.shape[dim]
    if wanted == 0 or not bool((index.data.diff() == 1).all()):
        return None
    first = int(index.data[0])
    low, high = min(max(first, 0), extent), min(max(first + wanted, 0), extent)
    part = x.data.narrow(dim, low, max(high - low, 0))
    if high - low < wanted:
        before = min(max(-first, 0), wanted) if high > low else wanted
        shape = list(part.shape)
        pieces = [part.new_zeros(_with(shape, dim, before)), part, part.new_zeros(_with(shape, dim, wanted - before - max(high - low, 0)))]
        part = torch.cat(pieces, dim)
    return rename(Value(part, x.axes), axis, index.axes[0])


def _with(shape: list[int], dim: int, extent: int) -> list[int]:
    return [extent if d == dim else n for d, n in enumerate(shape)]


def _gather(x: Value, at: Sequence[tuple[str, Value]], setting: Setting) -> Value:
    indexed = dict(at)
    positions = union(indexed.values())
    others = [a for a in x.axes if a not in indexed]
    shared = [a for a in others if a in positions]
    rest = [a for a in others if a not in positions]
    if any(setting.extents[a] == 0 for a in indexed):
        axes = tuple(sorted((*positions, *rest)))
        return Value(x.data.new_zeros([setting.extents[a] for a in axes]), axes)
    order = [*shared, *indexed, *rest]
    data = x.data.permute([x.axes.index(a) for a in order])
    along = [Value(torch.arange(setting.extents[a], device=x.data.device), (a,)) for a in shared]
    inside = [Value((e.data >= 0) & (e.data < setting.extents[a]), e.axes) for a, e in at]
    clamped = [Value(e.data.clamp(0, setting.extents[a] - 1), e.axes) for a, e in at]
    found = data[tuple(align(i, positions) for i in (*along, *clamped))]
    for condition in inside:
        if not bool(condition.data.all()):
            kept = align(condition, positions)
            found = torch.where(
                kept.reshape(*kept.shape, *(1 for _ in rest)), found, torch.zeros((), dtype=found.dtype, device=found.device)
            )
    axes = (*positions, *rest)
    final = tuple(sorted(axes))
    return Value(found.permute([axes.index(a) for a in final]), final)


def select(over: Sequence[str], x: Value, k: Value, where: Value | None, setting: Setting) -> Value:
    """True on the ``k`` largest over ``over`` where ``where`` holds; the lower position wins a tie.

    With several axes positions are compared in the order of the axes' names. A range whose scores are all -inf is empty.
    """
    x = number(Value(x.data.detach(), x.axes))
    kept = tuple(a for a in union((x, where, k)) if a not in over)
    axes = tuple(sorted((*kept, *over)))
    nothing = -_infinity(x.data.dtype)
    full = Value(expand(x, axes, setting), axes)
    scores, condition, _ = spread(full, where, over, nothing, setting)
    if scores.shape[-1] == 0:
        return Value(torch.zeros(full.data.shape, dtype=torch.bool, device=scores.device), axes)
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    if condition is not None:  # what is masked comes after a score of -inf
        later = (~condition).gather(-1, order).to(torch.int8).sort(dim=-1, stable=True).indices
        order = order.gather(-1, later)
    ranks = torch.arange(scores.shape[-1], device=scores.device).expand(order.shape)
    rank = torch.empty_like(order).scatter_(-1, order, ranks)
    chosen = (rank < expand(k, kept, setting).unsqueeze(-1)) & (scores != nothing).any(-1, keepdim=True)
    if condition is not None:
        chosen = chosen & condition
    split = chosen.reshape(*chosen.shape[:-1], *(setting.extents[a] for a in axes if a in over))
    source = (*kept, *(a for a in axes if a in over))
    return Value(split.permute([source.index(a) for a in axes]), axes)
