"""Plans made by hand for the tests of the printers: causal softmax attention, forward and backward, and small kernels.

Each builder returns a plan; ``specialization`` makes what a printer wants beside it. Axes: b g r (grid), i (queries),
j (keys), d (keys' width), e (values' width).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from weft.codegen.source import Specialization
from weft.compiler import ir
from weft.compiler import plan as p
from weft.dsl import typed

NOWHERE = typed.Span(1, 1, 1, 1)
SPEC_TEXT = """\
kernel attention(q[b,(g r),i,d], k[b,g,j,d], v[b,g,j,e]) -> o[b,(g r),i,e], lse[b,(g r),i]:
    mask j <= i
    s = sum[d](q * k) / sqrt(size(d))
    o = sum[j](softmax[j](s) * v)
    lse = lse[j](s)
"""

MINUS_INFINITY = ir.const(float("-inf"))
ZERO = ir.const(0.0)


def empty_graph(name: str = "attention") -> ir.Graph:
    kernel = typed.Kernel(name, "", (), (), (), (), (), (), (), NOWHERE)
    return ir.Graph(kernel, {})


def tensor(name: str, axes: str, kind: ir.Kind = "real") -> ir.Input:
    found: ir.Input = ir.make(ir.Input, axes.split(), kind, name)
    return found


def product(name: str, axes: str) -> ir.Input:
    """A node that stands for the result of a ``Contract`` or ``Fold``: printers ask it for its axes alone."""
    return tensor(f"{name}*", axes)


def make_plan(
    direction: Literal["forward", "backward"],
    buffers: list[p.Buffer],
    kernels: list[p.Kernel],
    names: dict[ir.Node, str],
    lines: dict[ir.Node, int] | None = None,
) -> p.Plan:
    """A plan whose unnamed operations and locals are named after themselves."""
    names = dict(names)
    taken = set(names.values())
    for kernel in kernels:
        for statement in p.inner_statements(kernel.body):
            for node in _named_nodes(statement):
                if node not in names:
                    names[node] = _fresh(node, taken)
    return p.Plan(empty_graph(), direction, {b.name: b for b in buffers}, kernels, names, lines or {})


def _named_nodes(statement: p.Statement) -> list[ir.Node]:
    match statement:
        case p.Load(node=node) | p.Compute(node=node) | p.Contract(node=node) | p.Fold(node=node):
            return [node]
        case p.Begin(local=local) | p.Accumulate(local=local) | p.Scatter(local=local):
            return [local]
        case p.Advance(local=local, rescale=rescale):
            return [local, rescale]
        case p.Store() | p.Loop():
            return []


def _fresh(node: ir.Node, taken: set[str]) -> str:
    match node:
        case ir.Input(name=name) | p.Local(name=name):
            wish = name.rstrip("*")
        case ir.Pointwise(op=op):
            wish = f"{op}_value"
        case _:
            wish = "value"
    name, number = wish, 2
    while name in taken:
        name, number = f"{wish}_{number}", number + 1
    taken.add(name)
    return name


def specialization(plan: p.Plan, dtype: str, extents: dict[str, int], params: dict[str, int | bool] | None = None) -> Specialization:
    """The concrete dtypes of a plan's buffers, its whole extents and its compiled params."""
    whole = {a for k in plan.kernels for a in k.whole}
    return Specialization(
        tuple((b.name, dtype if b.dtype == "input" else b.dtype) for b in plan.buffers.values()),
        tuple(sorted((a, e) for a, e in extents.items() if a in whole)),
        tuple(sorted((params or {}).items())),
    )


def op(name: str, *args: ir.Node) -> ir.Node:
    return ir.pointwise(name, *args)


# Causal softmax attention -----------------------------------------------------------------------------------------

HEAD = "b g r"
Q, K, V = tensor("q", "b g r i d"), tensor("k", "b g j d"), tensor("v", "b g j e")
OUT, LSE = tensor("o", "b g r i e"), tensor("lse", "b g r i")
D_O, DELTA = tensor("d_o", "b g r i e"), product("delta", "b g r i")
SCALE: ir.Param = ir.make(ir.Param, (), "real", "scale")

Q_BUFFER = p.Buffer("q", ("b", "g", "r", "i", "d"), "input", "input")
K_BUFFER = p.Buffer("k", ("b", "g", "j", "d"), "input", "input")
V_BUFFER = p.Buffer("v", ("b", "g", "j", "e"), "input", "input")
ROW_AXES = ("b", "g", "r", "i")


def causal(masked: ir.Node, otherwise: ir.Node) -> ir.Node:
    """``masked`` where the key is not after the query and inside the sequence."""
    position_i = op("add", p.index("i"), p.origin("i"))
    keep = op("and", op("le", p.index("j"), position_i), op("lt", p.index("j"), ir.size("j")))
    return op("where", keep, masked, otherwise)


def causal_steps(masked: ir.Node, otherwise: ir.Node) -> list[p.Statement]:
    """Every operation of ``causal`` as a statement of its own, as a scheduler writes them."""
    known = set(ir.topological([masked, otherwise]))
    return [p.Compute(n) for n in ir.topological([causal(masked, otherwise)]) if isinstance(n, ir.Pointwise) and n not in known]


def key_bounds(block_j: int) -> tuple[ir.Node, ir.Node]:
    """Where full tiles of keys end, and where the row tile's last key is passed."""
    first = op("add", p.edge("i", "start"), p.origin("i"))
    seen = op("min", op("add", first, ir.const(1)), ir.size("j"))
    full = op("mul", op("floordiv", op("max", seen, ir.const(0)), ir.const(block_j)), ir.const(block_j))
    last = op("add", p.edge("i", "stop"), p.origin("i"))
    return full, op("min", last, ir.size("j"))


def attention_forward(block_i: int = 32, block_j: int = 32) -> p.Plan:
    raw = product("raw", "b g r i j")
    scores = op("mul", raw, SCALE)
    row_max, row_sum, acc = p.local("row_max", ("i",)), p.local("row_sum", ("i",)), p.local("acc", ("i", "e"))
    rescale = p.local("rescale", ("i",))

    def sweep(masked: bool) -> tuple[p.Statement, ...]:
        final = causal(scores, MINUS_INFINITY) if masked else scores
        weight = op("expdiff", final, row_max)
        return (
            p.Load(K, "k", (), ("j",) if masked else ()),
            p.Contract(raw, Q, K, ("d",)),
            p.Compute(scores),
            *(causal_steps(scores, MINUS_INFINITY) if masked else ()),
            p.Advance(row_max, final, ("j",), rescale),
            p.Compute(weight),
            p.Accumulate(row_sum, "sum", weight, None, ("j",), rescale),
            p.Load(V, "v", (), ("j",) if masked else ()),
            p.Accumulate(acc, "sum", weight, V, ("j",), rescale),
        )

    full, stop = key_bounds(block_j)
    ratio = op("div", acc, row_sum)
    some = op("gt", row_sum, ZERO)
    o = op("where", some, ratio, ZERO)
    lse = op("add", row_max, op("log", row_sum))
    body: tuple[p.Statement, ...] = (
        p.Begin(row_max, "max"),
        p.Begin(row_sum, "sum"),
        p.Begin(acc, "sum"),
        p.Load(Q, "q", (), ("i",)),
        p.Loop("j", block_j, ir.const(0), full, sweep(False), "full tiles: no mask"),
        p.Loop("j", block_j, full, stop, sweep(True), "the diagonal and the last keys"),
        p.Compute(ratio),
        p.Compute(some),
        p.Compute(o),
        p.Store("o", o, ("i",)),
        p.Compute(lse.args[1]),  # type: ignore[attr-defined]
        p.Compute(lse),
        p.Store("lse", lse, ("i",)),
    )
    kernel = p.Kernel(
        "forward", ("b", "g", "r"), "i", {"i": block_i, "j": block_j}, ("d", "e"), ("i", "j", "d", "e"), body, "one sweep over the keys"
    )
    buffers = [
        Q_BUFFER, K_BUFFER, V_BUFFER,
        p.Buffer("o", (*ROW_AXES, "e"), "input", "output"),
        p.Buffer("lse", ROW_AXES, "float32", "saved"),
    ]  # fmt: skip
    names: dict[ir.Node, str] = {scores: "scores", o: "o", lse: "lse", causal(scores, MINUS_INFINITY): "masked"}
    for masked in (scores, causal(scores, MINUS_INFINITY)):
        names[op("expdiff", masked, row_max)] = "p" if masked is scores else "p_masked"
    return make_plan("forward", buffers, [kernel], names, {raw: 3, scores: 3, o: 4, lse: 5, K: 3, V: 4})


def backward_tile(masked: bool) -> tuple[list[p.Statement], ir.Node, ir.Node]:
    """Weights recomputed from the saved lse, and the gradient of the scores, for one tile: (i, j)."""
    raw = product("raw", "b g r i j")
    scores = op("mul", raw, SCALE)
    final = causal(scores, MINUS_INFINITY) if masked else scores
    weight = op("expdiff", final, LSE)
    d_weight = product("d_weight", "b g r i j")
    centred = op("sub", d_weight, DELTA)
    d_scores = op("mul", weight, centred)
    steps = [
        p.Contract(raw, Q, K, ("d",)),
        p.Compute(scores),
        *(causal_steps(scores, MINUS_INFINITY) if masked else []),
        p.Compute(weight),
        p.Contract(d_weight, D_O, V, ("e",)),
        p.Compute(centred),
        p.Compute(d_scores),
    ]
    return list(steps), weight, d_scores


def query_loads() -> list[p.Statement]:
    return [
        p.Load(Q, "q", (), ("i",)),
        p.Load(D_O, "d_o", (), ("i",)),
        p.Load(LSE, "lse", (), ("i",)),
        p.Load(DELTA, "delta", (), ("i",)),
    ]


def key_loads() -> list[p.Statement]:
    return [p.Load(K, "k", (), ("j",)), p.Load(V, "v", (), ("j",))]


def delta_kernel(block_i: int) -> p.Kernel:
    gained = op("mul", D_O, OUT)
    body = (
        p.Load(D_O, "d_o", (), ("i",)),
        p.Load(OUT, "o", (), ("i",)),
        p.Compute(gained),
        p.Fold(DELTA, "sum", gained, ("e",)),
        p.Store("delta", DELTA, ("i",)),
    )
    return p.Kernel("row_delta", ("b", "g", "r"), "i", {"i": block_i}, ("e",), ("i", "e"), body, "delta = do . o")


def key_gradients(block_i: int, block_j: int) -> p.Kernel:
    d_k, d_v = p.local("d_k", ("j", "d")), p.local("d_v", ("j", "e"))
    steps, weight, d_scores = backward_tile(masked=True)
    inner = (
        *query_loads(),
        *steps,
        p.Accumulate(d_v, "sum", weight, D_O, ("i", "r")),
        p.Accumulate(d_k, "sum", d_scores, Q, ("i", "r")),
    )
    first = op("max", op("sub", p.edge("j", "start"), p.origin("i")), ir.const(0))
    rows = p.Loop("i", block_i, first, ir.size("i"), inner, "queries from the diagonal on")
    scaled = op("mul", d_k, SCALE)
    body = (
        p.Begin(d_k, "sum"),
        p.Begin(d_v, "sum"),
        *key_loads(),
        p.Loop("r", None, ir.const(0), ir.size("r"), (rows,), "query heads that share this key head"),
        p.Compute(scaled),
        p.Store("d_k", scaled, ("j",)),
        p.Store("d_v", d_v, ("j",)),
    )
    return p.Kernel("key_gradients", ("b", "g"), "j", {"i": block_i, "j": block_j}, ("d", "e"), ("j", "i", "d", "e"), body, "dk and dv")


def query_gradients(block_i: int, block_j: int) -> p.Kernel:
    d_q = p.local("d_q", ("i", "d"))
    full, stop = key_bounds(block_j)

    def sweep(masked: bool) -> tuple[p.Statement, ...]:
        steps, _, d_scores = backward_tile(masked)
        return (*key_loads(), *steps, p.Accumulate(d_q, "sum", d_scores, K, ("j",)))

    scaled = op("mul", d_q, SCALE)
    body = (
        p.Begin(d_q, "sum"),
        *query_loads(),
        p.Loop("j", block_j, ir.const(0), full, sweep(False), "full tiles: no mask"),
        p.Loop("j", block_j, full, stop, sweep(True), "the diagonal and the last keys"),
        p.Compute(scaled),
        p.Store("d_q", scaled, ("i",)),
    )
    return p.Kernel("query_gradients", ("b", "g", "r"), "i", {"i": block_i, "j": block_j}, ("d", "e"), ("i", "j", "d", "e"), body, "dq")


def backward_buffers() -> list[p.Buffer]:
    return [
        Q_BUFFER, K_BUFFER, V_BUFFER,
        p.Buffer("o", (*ROW_AXES, "e"), "input", "saved"),
        p.Buffer("lse", ROW_AXES, "float32", "saved"),
        p.Buffer("d_o", (*ROW_AXES, "e"), "input", "cotangent"),
        p.Buffer("delta", ROW_AXES, "float32", "temporary"),
        p.Buffer("d_q", (*ROW_AXES, "d"), "input", "gradient"),
        p.Buffer("d_k", ("b", "g", "j", "d"), "input", "gradient"),
        p.Buffer("d_v", ("b", "g", "j", "e"), "input", "gradient"),
    ]  # fmt: skip


def backward_names() -> dict[ir.Node, str]:
    names: dict[ir.Node, str] = {}
    for masked, suffix in ((False, ""), (True, "_masked")):
        _, weight, d_scores = backward_tile(masked)
        names |= {weight: f"p{suffix}", d_scores: f"ds{suffix}"}
    return names


def attention_backward(block_i: int = 32, block_j: int = 32) -> p.Plan:
    kernels = [delta_kernel(block_i), key_gradients(block_i, block_j), query_gradients(block_i, block_j)]
    return make_plan("backward", backward_buffers(), kernels, backward_names())


def attention_backward_owner(block_i: int = 32, block_j: int = 32) -> p.Plan:
    """For a CPU: one program a head keeps dk and dv of its keys at hand and adds to dq in memory."""
    kernel = key_gradients(block_i, block_j)
    d_q = p.local("d_q", ("i", "d"))
    _, _, d_scores = backward_tile(masked=True)

    def with_query_gradient(statement: p.Statement) -> p.Statement:
        if not isinstance(statement, p.Loop):
            return statement
        body = tuple(with_query_gradient(s) for s in statement.body)
        if statement.axis == "i":
            scaled = op("mul", d_scores, SCALE)
            body = (*body, p.Compute(scaled), p.Accumulate(d_q, "sum", scaled, K, ("j",)))
        return replace(statement, body=body)

    body = (p.Begin(d_q, "sum", "d_q"), *(with_query_gradient(s) for s in kernel.body))
    owner = replace(kernel, name="gradients", body=body, owner=True, note="dq, dk and dv")
    return make_plan("backward", backward_buffers(), [delta_kernel(block_i), owner], backward_names())


# Small kernels ----------------------------------------------------------------------------------------------------


def pointwise_kernel(operation: str, arguments: int, block: int = 64, kinds: str = "real") -> p.Plan:
    """``out[t] = operation(x0[t], x1[t] ...)``; ``kinds`` is the kind of all arguments, or one word for each."""
    each = kinds.split() * arguments if len(kinds.split()) == 1 else kinds.split()
    inputs = [tensor(f"x{n}", "t", _kind(kind)) for n, kind in zip(range(arguments), each, strict=False)]
    node = op(operation, *inputs)
    dtypes: dict[str, p.Dtype] = {"real": "float32", "int": "int64", "bool": "bool"}
    buffers = [p.Buffer(x.name, ("t",), dtypes[x.kind], "input") for x in inputs]
    buffers.append(p.Buffer("out", ("t",), dtypes[node.kind], "output"))
    loads = [p.Load(x, x.name, (), ("t",)) for x in inputs]
    body = (*loads, p.Compute(node), p.Store("out", node, ("t",)))
    kernel = p.Kernel("apply", (), "t", {"t": block}, (), ("t",), body, operation)
    return make_plan("forward", buffers, [kernel], {node: "result"})


def _kind(word: str) -> ir.Kind:
    match word:
        case "bool" | "int" | "real":
            return word
        case _:
            raise ValueError(word)
