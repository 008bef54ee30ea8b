"""The documents say what is so: programs in them run, and dumps in them are what the commands print."""

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from weft.cli import main
from weft.runtime.load import loads

ROOT = Path(__file__).resolve().parent.parent
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(path: Path) -> list[tuple[str, str]]:
    """The language and the text of every fenced block."""
    return BLOCK.findall(path.read_text(encoding="utf-8"))


FOUND = [(f"{path.name}-{n}", language, text) for path in TEXTS for n, (language, text) in enumerate(blocks(path))]
PROGRAMS = [pytest.param(text, id=name) for name, language, text in FOUND if language == "python"]
WRITTEN = [(name, text) for name, language, text in FOUND if language != "python" and re.search(r"^kernel \w+\(", text, re.MULTILINE)]
SPECS = [pytest.param(text, id=name) for name, text in WRITTEN]
DUMPS = [pytest.param(text, id=name) for name, _, text in FOUND if re.match(r"\$ weft show \w+ --(what graph|after)", text)]


@pytest.mark.parametrize("text", PROGRAMS)
def test_programs_run(text: str) -> None:
    exec(compile(text, "document", "exec"), {})


@pytest.mark.parametrize("text", SPECS)
def test_specs_are_specs(text: str) -> None:
    assert len(loads(text)) == 1


@pytest.mark.parametrize("text", DUMPS)
def test_dumps_are_what_the_command_prints(text: str) -> None:
    command, *lines = text.strip().splitlines()
    result = CliRunner().invoke(main, command.removeprefix("$ weft ").split())
    assert result.exit_code == 0, result.output
    assert lines == result.stdout.strip().splitlines()


@pytest.mark.parametrize("path", TEXTS, ids=lambda p: p.name)
def test_links_and_named_files_exist(path: Path) -> None:
    text = BLOCK.sub("", path.read_text(encoding="utf-8"))
    linked = re.findall(r"\]\(([\w./-]+)\)(?!`)", text)
    named = re.findall(r"`((?:dsl|compiler|codegen|runtime|specs|benchmarks|docs|tests)/[\w./-]+\.\w+)`", text)
    assert [t for t in linked if not (path.parent / t).exists()] == []
    assert [t for t in named if not (ROOT / t).exists() and "NAME" not in t] == []


def test_commands_in_the_readme_are_commands() -> None:
    named = set(re.findall(r"\bweft (\w+)", "".join(text for _, text in blocks(ROOT / "README.md"))))
    assert named and named <= set(main.commands)
