"""Warnings about what is right by the language, but seldom meant."""

from weft import dsl

HEAD = "kernel f(q[b,i,d], k[b,j,d], v[b,j,e], pad[b,j]: bool) -> o[b,i,e]:\n"


def warnings(*lines: str) -> list[str]:
    return [str(w) for w in dsl.lint(dsl.parse(HEAD + "".join(f"    {line}\n" for line in lines), "a.weft"))]


def test_a_mask_below_the_softmax_that_it_was_meant_for() -> None:
    assert warnings("s = sum[d](q * k)", "p = softmax[j](s)", "mask pad", "o = sum[j](p * v)") == [
        "a.weft:3:9: warning: `softmax[j]` on line 3 is above the mask on `j` on line 4\n"
        "  3 |     p = softmax[j](s)\n"
        "    |         ^^^^^^^^^^^^^\n"
        "  help: a mask restricts only the lines below it: move it up if it is meant here, too"
    ]
    assert len(warnings("s = sum[d](q * k)", "z = lse[j](s)", "mask j <= i", "o = sum[j](exp(s - z) * v)")) == 1


def test_a_mask_above_is_as_it_should_be() -> None:
    assert warnings("mask pad", "o = sum[j](softmax[j](sum[d](q * k)) * v)") == []


def test_a_mask_on_another_axis_is_fine() -> None:
    assert warnings("p = softmax[i](q)", "mask pad", "o = sum[j](sum[d](p * k) * v)") == []


def test_a_routing_by_the_same_scores_is_fine() -> None:
    assert warnings("s = sum[d](q * k)", "p = softmax[j](s)", "mask topk[j](p, 2)", "o = sum[j](p * v)") == []
    assert warnings("s = sum[d](q * k)", "z = lse[j](s)", "mask topk[j](s, 2)", "o = sum[j](exp(s - z) * v)") == []


def test_a_softmax_with_a_restriction_of_its_own_is_fine() -> None:
    assert warnings("s = sum[d](q * k)", "p = softmax[j where pad](s)", "mask j <= i", "o = sum[j](p * v)") == []
