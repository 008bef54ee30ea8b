"""The command line, run in this process: what it prints, its exit status, and that no error shows a traceback."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from weft.cli import main
from weft.runtime.library import shipped

BAD = """
kernel bad(q[b,i,d], k[b,j,d]) -> o[b,i]:
    o = sum[j](sum[d](q * kk))
"""
GOOD = """
\"\"\"A sum of scores.\"\"\"

kernel {name}(q[b,i,d], k[b,j,d]) -> o[b,i]:
    mask j <= i
    o = sum[j](sum[d](q * k))
"""


def weft(*arguments: str | Path) -> Result:
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert "Traceback" not in result.output
    return result


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.weft"
    path.write_text(GOOD.format(name="good"))
    return path


def test_list_names_every_shipped_spec() -> None:
    found = json.loads(weft("list", "--json").stdout)
    assert [entry["name"] for entry in found] == sorted(path.stem for path in shipped().values())
    assert all(entry["title"] for entry in found)


def test_list_searches_names_and_titles() -> None:
    lines = weft("list", "neighborhood").stdout.strip().splitlines()
    assert [line.split()[0] for line in lines] == ["natten1d", "natten2d", "natten3d"]


def test_new_renames_the_kernel_and_says_what_is_next(tmp_path: Path) -> None:
    result = weft("new", "mine", "--from", "sliding_window", "--folder", tmp_path)
    assert result.exit_code == 0
    text = (tmp_path / "mine.weft").read_text()
    assert "kernel mine(" in text and "kernel sliding_window(" not in text
    assert f"weft check {tmp_path / 'mine.weft'}" in result.stdout


def test_new_does_not_overwrite(tmp_path: Path) -> None:
    (tmp_path / "mine.weft").write_text("precious")
    result = weft("new", "mine", "--from", "alibi", "--folder", tmp_path)
    assert result.exit_code == 2
    assert "exists already" in result.output
    assert (tmp_path / "mine.weft").read_text() == "precious"


@pytest.mark.parametrize("name", ["2fast", "a-b", "../up"])
def test_new_refuses_a_name_that_no_kernel_can_have(tmp_path: Path, name: str) -> None:
    result = weft("new", name, "--from", "alibi", "--folder", tmp_path)
    assert result.exit_code == 2
    assert not list(tmp_path.iterdir())


def test_unknown_spec_is_a_mistake_with_a_suggestion() -> None:
    result = weft("explain", "sliding_windw")
    assert result.exit_code == 2
    assert "sliding_window" in result.output


@pytest.mark.parametrize("command", ["check", "show", "explain", "plot", "bench", "build"])
def test_a_bad_spec_is_shown_with_its_line(tmp_path: Path, command: str) -> None:
    path = tmp_path / "bad.weft"
    path.write_text(BAD)
    result = weft(command, path)
    assert result.exit_code == 2
    assert f"{path}:3:27" in result.output
    assert "did you mean `k`" in result.output.lower()


@pytest.mark.parametrize("command", ["check", "show", "explain", "plot", "bench", "build"])
def test_a_missing_file_is_a_mistake(command: str) -> None:
    result = weft(command, "nowhere/nothing.weft")
    assert result.exit_code == 2
    assert "nothing.weft" in result.output


def test_a_kernel_must_be_chosen_where_there_are_several(tmp_path: Path) -> None:
    path = tmp_path / "two.weft"
    path.write_text(GOOD.format(name="first") + GOOD.format(name="second").replace('"""A sum of scores."""', ""))
    assert "--kernel" in weft("explain", path).output
    assert weft("show", path, "--kernel", "second", "--what", "graph").exit_code == 0
    missing = weft("show", path, "--kernel", "third")
    assert missing.exit_code == 2 and "first, second" in missing.output


def test_check_passes_and_prints_json(good: Path) -> None:
    result = weft("check", good, "--backend", "c", "--quick", "--trials", "1", "--json")
    assert result.exit_code == 0, result.output
    (report,) = json.loads(result.stdout)
    assert report["passed"] and report["kernel"] == "good" and report["results"]


def test_check_fails_with_a_command_that_reproduces_it(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from weft.runtime.kernel import Kernel

    right = Kernel.__call__

    def wrong(self, *tensors, **options):  # type: ignore[no-untyped-def]
        return right(self, *tensors, **options) * 1.01

    monkeypatch.setattr(Kernel, "__call__", wrong)
    result = weft("check", good, "--backend", "reference", "--quick", "--trials", "1")
    assert result.exit_code == 1
    assert f"reproduce: weft check {good}" in result.stdout


def test_check_refuses_a_case_that_is_none(good: Path) -> None:
    result = weft("check", good, "--case", "{nonsense")
    assert result.exit_code == 2
    assert "JSON" in result.output


def test_show_equations_are_the_lines_of_the_kernel(good: Path) -> None:
    assert weft("show", good, "--what", "equations").stdout.strip() == GOOD.format(name="good").split('"""')[2].strip()


def test_show_graph_reads_like_the_spec() -> None:
    lines = weft("show", "softmax_attention", "--what", "graph").stdout.splitlines()
    assert "s[b, g, i, j, r] = sum[d](q * k) / sqrt(size(d))" in lines
    assert any(line.startswith("o[b, e, g, i, r] = sum[j where ") for line in lines)


def test_show_plan_and_source() -> None:
    assert "for every b" in weft("show", "alibi", "--what", "plan").stdout
    assert "#include" in weft("show", "alibi", "--what", "source", "--backend", "c").stdout
    backward = weft("show", "alibi", "--what", "source", "--backend", "triton", "--part", "backward").stdout
    assert "@triton.jit" in backward and "d_q" in backward


def test_show_after_a_pass() -> None:
    passes = weft("show", "alibi", "--after", "list").stdout.split()
    assert passes[0] == "build" and passes[-1] == "schedule"
    assert "d_q[" in weft("show", "alibi", "--after", "differentiate").stdout
    assert "steps of S along t" in weft("show", "gla", "--after", "recur").stdout
    assert "d_x[" in weft("show", "moe_soft", "--after", "differentiate").stdout  # of which no plan is made
    unknown = weft("show", "alibi", "--after", "nothing")
    assert unknown.exit_code == 2 and "differentiate" in unknown.output


def test_show_what_long_calls_run_on() -> None:
    triton = ("--backend", "triton", "--long")
    assert "t.in64.2" in weft("show", "simple_gla", "--what", "plan", *triton).stdout
    assert "t.in64" not in weft("show", "simple_gla", "--what", "plan", "--backend", "triton").stdout
    assert "t.u.in64" in weft("show", "gated_delta_product", "--what", "graph", *triton).stdout
    assert "state_1" in weft("show", "retention", "--what", "graph", "--long").stdout
    for name, why in (("alibi", "does not separate into values of i and of j"), ("gru", "what is kept of y depends on states")):
        found = weft("show", name, *triton)
        assert found.exit_code == 2
        assert why in found.stderr, found.stderr
    assert "steps are taken one by one" in weft("show", "gla", "--long").stderr


def test_show_says_why_there_is_no_plan() -> None:
    result = weft("show", "dsa", "--what", "plan")
    assert result.exit_code == 2
    assert "runs as" in result.output and "topk" in result.output


def test_explain_counts_what_the_mask_leaves() -> None:
    sizes = ["--size", "i=2048", "--size", "j=2048", "--size", "d=64", "--size", "e=64", "--size", "h=1", "--json"]
    full = json.loads(weft("explain", "full", *sizes).stdout)
    window = json.loads(weft("explain", "sliding_window", *sizes).stdout)
    assert full["forward"]["kernels"][0]["cost"]["products"] == 2 * 2 * 2048 * 2048 * 64
    assert window["forward"]["flops"] < full["forward"]["flops"] / 4
    assert full["forward"]["moved"] >= 4 * 2048 * 64 * 4
    assert "one sweep over j" in full["kind"]


def test_explain_says_what_runs_outside_and_why() -> None:
    result = weft("explain", "dsa")
    assert result.exit_code == 0
    assert "nothing is fused" in result.stdout and "because" in result.stdout


def test_explain_a_second_sweep() -> None:
    assert "2 sweeps over j" in weft("explain", "centred_relu").stdout


def test_explain_says_the_class_of_every_state_and_why() -> None:
    shown = weft("explain", "mlstm").stdout
    assert "class     recurrence: steps of C, n, m along t" in shown
    assert "state     C: scalar decay, after m (one number decays all of it)" in shown
    assert "state     m: running maximum" in shown


def test_plot_writes_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "deep" / "mask.png"
    result = weft("plot", "kitchen_sink", "--param", "window=16", "--out", path)
    assert result.exit_code == 0, result.output
    assert path.read_bytes().startswith(b"\x89PNG")


def test_plot_as_text_shows_the_mask() -> None:
    lines = weft("plot", "sliding_window", "--text", "--size", "i=8", "--size", "j=8", "--param", "window=2").stdout.splitlines()
    assert lines[0].startswith("mask: i down, j across")
    assert [line.rstrip() for line in lines[1:9]] == [" " * max(0, n - 1) + "@" * min(2, n + 1) for n in range(8)]


def test_plot_without_anything_to_plot() -> None:
    result = weft("plot", "hgrn")
    assert result.exit_code == 2
    assert "nothing to plot" in result.output


def test_bench_prints_and_writes_a_table(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    options = ["--length", "64", "--heads", "2", "--head-dim", "16", "--rounds", "2", "--without", "flex", "--out", path]
    result = weft("bench", "softmax_attention", *options)
    assert result.exit_code == 0, result.output
    data = json.loads(path.read_text())
    timings = {t["name"]: t for t in data["results"][0]["timings"]}
    assert timings.keys() == {"weft", "eager", "eager-torch", "sdpa"}
    assert all(t["forward"] > 0 and t["both"] > 0 and not t["fault"] for t in timings.values()), timings
    assert data["machine"]["torch"]


@pytest.mark.parametrize("option", [["--size", "i"], ["--size", "i=x"], ["--param", "window=wide"], ["--target", "sm_1"]])
def test_options_that_cannot_be_read(option: list[str]) -> None:
    assert weft("explain", "sliding_window", *option).exit_code == 2


def test_sizes_and_params_that_do_not_exist() -> None:
    size = weft("explain", "sliding_window", "--size", "z=3")
    assert size.exit_code == 2 and "no axis 'z'" in size.output
    param = weft("explain", "sliding_window", "--param", "windw=3")
    assert param.exit_code == 2 and "window" in param.output


def test_build_for_the_cpu_writes_sources(tmp_path: Path, good: Path) -> None:
    result = weft("build", good, "--out", tmp_path / "sources")
    assert result.exit_code == 0, result.output
    names = sorted(path.name.split("__")[1] for path in (tmp_path / "sources").iterdir())
    assert names == ["backward", "forward"]


def test_build_of_what_is_not_fused_fails() -> None:
    result = weft("build", "dsa")
    assert result.exit_code == 1
    assert "not fused" in result.output


def test_cache_reports_and_clears(tmp_path: Path, good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEFT_CACHE", str(tmp_path / "cache"))
    assert "holds 0 entries" in weft("cache").stdout
    assert weft("show", good, "--what", "graph").exit_code == 0
    assert "holds 0 entries" not in weft("cache").stdout
    assert "removed" in weft("cache", "--clear").stdout
    assert "holds 0 entries" in weft("cache").stdout


def test_an_unexpected_error_is_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    from weft.runtime import library

    def broken() -> dict[str, Path]:
        raise RuntimeError("the shelf fell down")

    monkeypatch.setattr(library, "shipped", broken)
    monkeypatch.delenv("WEFT_TRACEBACK", raising=False)
    result = weft("list")
    assert result.exit_code == 1
    assert "the shelf fell down" in result.output and "WEFT_TRACEBACK" in result.output
