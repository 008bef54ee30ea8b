"""Where a spec is found: the ones that come with weft, by name, and any file, by path."""

from __future__ import annotations

import ast
from pathlib import Path

from .errors import SpecNotFound

SHIPPED = Path(__file__).parent.parent / "specs"


def shipped() -> dict[str, Path]:
    """The specs that come with weft: name to file, in alphabetical order."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.weft"))}


def find(spec: str) -> Path:
    """The file of ``spec``: a path, or the name of a shipped spec. Raises ``SpecNotFound``."""
    path = Path(spec)
    if path.suffix == ".weft" or path.is_file():
        if not path.is_file():
            raise SpecNotFound(spec, shipped())
        return path
    known = shipped()
    if spec not in known:
        raise SpecNotFound(spec, known)
    return known[spec]


def title(path: Path) -> str:
    """The first line of a spec's docstring, without parsing the rest; empty where there is none."""
    text = path.read_text(encoding="utf-8", errors="replace").lstrip()
    if not text.startswith('"""'):
        return ""
    end = text.find('"""', 3)
    doc = ast.literal_eval(text[: end + 3]) if end > 0 and "\\" not in text[:end] else text[3:end]
    return str(doc).strip().split("\n")[0].strip()
