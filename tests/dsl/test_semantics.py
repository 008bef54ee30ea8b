"""What the statements mean: masks, states, reads, axes, kinds, samples."""

import math

import pytest

from weft import dsl
from weft.dsl import diagnostics as d
from weft.dsl import typed as t
from weft.dsl.extents import walk

PAIR = "kernel f(q[b,i,d], k[b,j,d], v[b,j,e], pad[b,j]: bool) -> o[b,i,e]:\n"
STEP = "kernel f(x[b,t,d], g[b,t]) -> o[b,t,d]:\n"


def resolve(head: str, *lines: str) -> t.Kernel:
    (kernel,) = dsl.parse(head + "".join(f"    {line}\n" for line in lines)).kernels
    return kernel


def fails(head: str, *lines: str) -> dsl.SpecError:
    with pytest.raises(dsl.SpecError) as caught:
        resolve(head, *lines)
    return caught.value


def value(kernel: t.Kernel, name: str) -> t.Expr:
    return next(s.expr for s in kernel.body if isinstance(s, t.Equation) and s.name == name)


def equation(kernel: t.Kernel, name: str) -> t.Equation:
    return next(s for s in kernel.body if isinstance(s, t.Equation) and s.name == name)


def reductions(root: t.Expr) -> list[t.Reduce]:
    return [n for n in walk([root]) if isinstance(n, t.Reduce)]


def shown(node: t.Expr) -> str:
    """A short text for conditions."""
    match node:
        case t.Pointwise(op=op, args=args):
            return f"{op}({', '.join(map(shown, args))})"
        case t.InputRef(name=name) | t.ValueRef(name=name) | t.ParamRef(name=name):
            return name
        case t.StateRef(name=name, version=version):
            return f"{name}'{version}"
        case t.Position(axis=axis):
            return axis
        case t.Literal(value=v):
            return repr(v)
        case t.Read(x=x, at=at):
            return f"{shown(x)}[{', '.join(f'{a}->{shown(e)}' for a, e in at)}]"
        case _:
            return type(node).__name__


# Masks ---------------------------------------------------------------------------------------------------------------


def test_a_mask_restricts_the_lines_below_it_along_its_axes() -> None:
    kernel = resolve(PAIR, "above = sum[j](v)", "mask j <= i", "mask pad", "s = sum[d](q * k)", "p = softmax[j](s)", "o = sum[j](p * v)")
    assert reductions(value(kernel, "above"))[0].where == ()
    assert reductions(value(kernel, "s"))[0].where == ()
    for name in ("p", "o"):
        assert [shown(w) for w in reductions(value(kernel, name))[0].where] == ["le(j, i)", "pad"]


def test_a_mask_acts_inside_nested_reductions_and_scans() -> None:
    kernel = resolve(PAIR, "mask j <= i", "o = sum[j](cumsum[j](sum[d](q * k)) * v)")
    scan = next(n for n in walk([value(kernel, "o")]) if isinstance(n, t.Scan))
    assert [shown(w) for w in scan.where] == ["le(j, i)"]


def test_where_restricts_one_reduction_only_and_adds_its_axes() -> None:
    kernel = resolve(PAIR, "m = mean[j where j <= i](cumsum[j](v))", "o = m")
    outer = reductions(value(kernel, "m"))[0]
    assert outer.axes == {"b", "e", "i"}
    assert [shown(w) for w in outer.where] == ["le(j, i)"]
    assert isinstance(outer.x, t.Scan) and outer.x.where == ()


def test_an_explicit_where_gives_the_operand_the_axis_of_a_mask() -> None:
    kernel = resolve(PAIR, "mask j <= i", "o = mean[j where pad and j <= i](v)")
    assert len(reductions(value(kernel, "o"))[0].where) == 2


def test_a_mask_with_an_axis_that_the_operand_lacks_is_an_error() -> None:
    error = fails(PAIR, "mask j <= i", "o = mean[j](v)")
    assert isinstance(error, d.MaskAxisMissing)


def test_a_count_needs_the_other_axes_of_the_mask() -> None:
    assert isinstance(fails(PAIR, "mask j <= i", "n = sum[j](1)", "o = sum[j](v)"), dsl.SpecErrors)
    kernel = resolve(PAIR, "n = sum[j where pad](1)", "o = n * q[d -> 0] * sum[j](v)")
    assert value(kernel, "n").axes == {"b"}
    assert value(kernel, "n").kind == "int"


def test_equations_keep_the_masks_whose_axes_they_have() -> None:
    kernel = resolve(PAIR, "mask j <= i", "s = sum[d](q * k)", "r = sum[d](k)", "o = sum[j](s * v)")
    assert [shown(m) for m in equation(kernel, "s").masks] == ["le(j, i)"]
    assert equation(kernel, "r").masks == ()
    assert equation(kernel, "o").masks == ()


def test_a_selection_keeps_its_axes_and_its_number_may_vary() -> None:
    kernel = resolve(PAIR, "n = sum[j where pad](1)", "c = topk[j](sum[d](q * k), n)", "mask c", "o = sum[j](sum[d](q * k) * v)")
    chosen = value(kernel, "c")
    assert isinstance(chosen, t.Reduce) and chosen.kind == "bool" and chosen.axes == {"b", "i", "j"}
    assert chosen.k is not None and shown(chosen.k) == "n"


def test_masks_do_not_reach_assumptions() -> None:
    kernel = resolve(PAIR, "mask j <= i", "assume all[j](pad)", "o = sum[j](sum[d](q * k) * v)")
    assert reductions(kernel.assumes[0])[0].where == ()


# States --------------------------------------------------------------------------------------------------------------


def test_reads_of_a_state_have_the_version_of_their_line() -> None:
    kernel = resolve(STEP, "state S[b,d] along t", "before = S", "S <- S + x", "S <- S * g", "o = S + before")
    assert shown(value(kernel, "before")) == "S'0"
    updates = [(s.version, shown(s.expr)) for s in kernel.body if isinstance(s, t.Update)]
    assert updates == [(1, "add(S'0, x)"), (2, "mul(S'1, g)")]
    assert shown(value(kernel, "o")) == "add(S'2, before)"
    assert value(kernel, "before").axes == {"b", "d", "t"}


def test_states_along_two_axes_in_reverse_with_a_start() -> None:
    head = "kernel f(x[b,(t u),d], s0[b,d]) -> S[b,d]:\n"
    kernel = resolve(head, "axis u = 2", "state S[b,d] = s0 along (t u) reverse", "S <- S + x")
    (state,) = [s for s in kernel.body if isinstance(s, t.State)]
    assert (state.along, state.reverse, state.axes) == (("t", "u"), True, ("b", "d"))
    assert state.init is not None and shown(state.init) == "s0"


def test_a_mask_on_the_time_axis_skips_steps() -> None:
    kernel = resolve(STEP, "mask g > 0", "state S[b,d] along t", "S <- S + x", "o = S")
    (state,) = [s for s in kernel.body if isinstance(s, t.State)]
    assert [shown(m) for m in state.masks] == ["gt(g, 0)"]


def test_equations_may_look_at_all_steps_but_updates_may_not() -> None:
    resolve(STEP, "state S[b,d] along t", "S <- S + x", "o = x * sum[t](S) + S[t -> size(t) - 1]")
    for look in ("sum[t](S)", "cumsum[t](S)", "S[t -> t - 1]", "softmax[t](S)"):
        error = fails(STEP, "state S[b,d] along t", f"past = {look}", "twice = 2 * past", "S <- S + twice", "o = S")
        assert isinstance(error, d.StepLooksElsewhere), look


def test_an_update_may_look_along_time_at_what_is_not_carried() -> None:
    resolve(STEP, "state S[b,d] along t", "S <- S + x[t -> t - 1] * sum[t](g)", "o = S")


def test_an_update_may_look_at_states_along_other_axes() -> None:
    resolve(
        STEP, "axis n = 3", "state S[b,d] along t", "S <- S + x", "state R[b,t,d] = S along n", "R <- R * sum[d](R)",
        "o = R[n -> size(n) - 1]",
    )  # fmt: skip


def test_a_chain_of_groups_is_fine_and_a_circle_is_not() -> None:
    states = ("state S[b,d] along t", "state R[b,d] along t reverse")
    resolve(STEP, *states, "S <- S + x", "R <- R + S", "o = R")
    assert isinstance(fails(STEP, *states, "a = 2 * R", "S <- S + a", "R <- R + S", "o = R"), d.StepsInterleave)


def test_a_state_as_an_output_is_final_or_every_step() -> None:
    body = "    state S[b,d] along t\n    S <- S + x\n"
    for axes in ("b,d", "b,t,d"):
        assert dsl.parse(f"kernel f(x[b,t,d]) -> S[{axes}]:\n{body}").kernels
    assert isinstance(fails("kernel f(x[b,t,d]) -> S[b,t]:\n", "state S[b,d] along t", "S <- S + x"), d.OutputAxes)


# Axes, reads, kinds --------------------------------------------------------------------------------------------------


def test_reads_replace_axes() -> None:
    kernel = resolve("kernel f(x[a,c], n[b]: int) -> o[b]:\n", "y = x[a -> n, c -> n + b]", "z = x[a -> c]", "o = y + sum[c](z)")
    assert value(kernel, "y").axes == {"b"}
    assert value(kernel, "z").axes == {"c"}


def test_reads_follow_any_postfix() -> None:
    kernel = resolve(PAIR, "s = softmax[j](sum[d](q * k)[i -> j])[j -> 0]", "o = s * q[d -> 0] * sum[j](v)")
    assert value(kernel, "s").axes == {"b"}


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("t", "int"), ("size(t)", "int"), ("t // 2 % 3", "int"), ("t / 2", "real"), ("floor(x)", "int"), ("round(x) * 2", "int"),
        ("2**t", "int"), ("2.0**-t", "real"), ("t < 2", "bool"), ("0 <= t < 2", "bool"), ("t < 2 and not x > 0", "bool"),
        ("where(t > 0, t, 1)", "int"), ("where(t > 0, x, 1)", "real"), ("where(x > 0, t > 0, t < 5)", "bool"), ("max(t, 1)", "int"),
        ("max(t, 1, 2.5)", "real"), ("abs(t)", "int"), ("sign(t)", "int"), ("exp(t)", "real"), ("clipgrad(x, 1)", "real"),
        ("sum[t](t > 2)", "int"), ("mean[t](t > 2)", "real"), ("mean[t](t)", "real"), ("sum[t](t)", "int"), ("max[t](t)", "int"),
        ("argmax[t](x)", "int"), ("softmax[t](t)", "real"), ("lse[t](t)", "real"), ("any[t](x > 0)", "bool"), ("topk[t](x, 2)", "bool"),
        ("cumsum[t](t > 2)", "int"), ("cummax[t](x)", "real"), ("cumlse[t](t)", "real"), ("inf", "real"), ("true", "bool"), ("+t", "int"),
        ("n[t -> 2]", "int"), ("m[t -> 2]", "bool"), ("w", "int"), ("m == (t > 1)", "bool"),
    ],
)  # fmt: skip
def test_kinds(text: str, kind: str) -> None:
    kernel = resolve("kernel f(x[t], n[t]: int64, m[t]: bool) -> o[t]:\n", "param w: int = 2", f"y = {text}", "o = x")
    assert value(kernel, "y").kind == kind


@pytest.mark.parametrize(
    "text", ["m + 1", "-m", "exp(m)", "x and m", "not t", "m < 1", "x // 2", "t % 2.0", "2**-1", "prod[t](m)", "any[t](x)", "max(m, 1)"]
)
def test_kinds_that_do_not_fit(text: str) -> None:
    error = fails("kernel f(x[t], m[t]: bool) -> o[t]:\n", f"y = {text}", "o = x")
    assert isinstance(error, d.NeedsBool | d.NeedsNumber | d.NeedsInt | d.NegativePower | d.MixedKinds)


def test_pointwise_and_reduced_maximum() -> None:
    kernel = resolve("kernel f(x[t], g[t]) -> o[t]:\n", "y = max(x, g, 0)", "z = max[t](x)", "o = y + z")
    assert shown(value(kernel, "y")) == "max(max(x, g), 0)"
    assert isinstance(value(kernel, "z"), t.Reduce)


def test_a_chain_of_comparisons_shares_its_middle() -> None:
    kernel = resolve("kernel f(x[t]) -> o[t]:\n", "y = 0 <= t - 1 < 4 != 5", "o = where(y, x, 0)")
    assert shown(value(kernel, "y")) == "and(and(le(0, sub(t, 1)), lt(sub(t, 1), 4)), ne(4, 5))"


def test_scan_flags() -> None:
    kernel = resolve(STEP, "o = cumsum[t, reverse, exclusive where g > 0](x)")
    scan = value(kernel, "o")
    assert isinstance(scan, t.Scan) and (scan.axis, scan.reverse, scan.exclusive) == ("t", True, True)
    assert [shown(w) for w in scan.where] == ["gt(g, 0)"]


def test_tensors_keep_their_dimensions_types_and_defaults() -> None:
    head = "kernel f(x[b,(g r),d], y[r]: bfloat16, n[]: int = -3, m[b]: bool = true, z[] = -inf) -> o[b,(g r),d]: float32:\n"
    kernel = resolve(head, "param w: float = 2", "param u: int", "o = x")
    assert kernel.inputs[0].dims == (("b",), ("g", "r"), ("d",))
    assert [(i.dtype, i.default) for i in kernel.inputs] == [
        (None, None), ("bfloat16", None), ("int", -3), ("bool", True), (None, -math.inf),
    ]  # fmt: skip
    assert kernel.outputs[0].dtype == "float32"
    assert [(p.name, p.kind, p.default) for p in kernel.params] == [("w", "float", 2.0), ("u", "int", None)]
    assert type(kernel.params[0].default) is float


def test_declared_axes_and_splits() -> None:
    kernel = resolve("kernel f(x[(m n),d]) -> o[m,n,d]:\n", "axis m = groups", "param groups: int = 8", "o = x")
    extents = {a.name: a.extent for a in kernel.axes}
    assert set(extents) == {"m", "n", "d"}
    assert extents["n"] is None and isinstance(extents["m"], t.ParamRef)


def test_a_split_may_be_solved_through_other_axes() -> None:
    resolve("kernel f(x[(m n)], y[(n p)], z[p]) -> o[m,n]:\n", "o = x * sum[p](y * z)")
    resolve("kernel f(x[(m n)], y[p]) -> o[m,n]:\n", "axis n = size(a) + 1", "axis a = size(p)", "o = x")
    error = fails("kernel f(x[(m n)]) -> o[m,n]:\n", "axis n = size(m)", "o = x")
    assert isinstance(error, d.AxisCycle)


def test_samples_and_assumptions() -> None:
    kernel = resolve(
        "kernel f(x[b,t], doc[b,t]: int, keep[t]: bool) -> o[b,t]:\n", "assume x <= 0 and doc >= 0", "sample x = -exp(normal()) / size(t)",
        "sample doc = sort[t](randint(0, 4))", "sample keep = uniform(0, 1) < 0.5 or t == 0", "o = x",
    )  # fmt: skip
    assert [name for name, _ in kernel.samples] == ["x", "doc", "keep"]
    sample = dict(kernel.samples)
    assert isinstance(sample["doc"], t.Sort) and sample["doc"].kind == "int"
    assert sample["x"].axes == {"b", "t"}
    assert sample["keep"].kind == "bool"
    assert kernel.assumes[0].kind == "bool"


def test_docstrings() -> None:
    spec = dsl.parse('"""The file.\n\n    A formula.\n"""\n\nkernel f(x[t]) -> y[t]:\n    """The kernel."""\n    y = x\n')
    assert (spec.doc, spec.kernels[0].doc) == ("The file.\n\nA formula.", "The kernel.")


def test_lines_go_on_inside_brackets() -> None:
    text = "kernel f(\n    x[t],  # the input\n    g[t],\n) -> y[t]:\n    y = (x\n\n  # here\n* g\n    )\n\n# the end"
    assert shown(value(dsl.parse(text).kernels[0], "y")) == "mul(x, g)"
