"""The disk cache: what was parsed, planned, printed and compiled, by a hash of everything it was made from.

An *entry* is a file of bytes with their checksum in front. A *folder* is a directory of files (generated source, a
binary) with a manifest of checksums. Both appear under their final name in one rename, so that any number of
processes may write at once, and both are verified before use: what is damaged is removed and made again.

The cache belongs to one user. A directory that somebody else owns or that everybody may write is not used, because a
binary from it would run as ours; entries hold data only (see ``pickling``).
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from .errors import CacheUnavailable

VARIABLE = "WEFT_CACHE"
_MANIFEST = "manifest.json"
_DIGEST_SIZE = 32


def digest(*parts: str | bytes) -> str:
    """A hex hash of the parts; their boundaries count."""
    state = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)
    return state.hexdigest()


def default_root() -> Path:
    """``$WEFT_CACHE``, or ``~/.cache/weft``."""
    given = os.environ.get(VARIABLE)
    if given:
        return Path(given).expanduser()
    try:
        return Path.home() / ".cache" / "weft"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"weft-{_user()}"


def disk_cache() -> Cache:
    """The cache at ``default_root()``, or a temporary one (after a ``CacheUnavailable`` warning) where that cannot be used."""
    root = default_root()
    found = _caches.get(root)
    if found is None:
        found = _caches[root] = _usable(root)
    return found


class Cache:
    """A cache below one directory. ``root`` changes to a temporary directory when it can no longer be written."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def read(self, kind: str, key: str) -> bytes | None:
        """The bytes of an entry, or None where there is none or it is damaged."""
        path = self._entry(kind, key)
        try:
            data = path.read_bytes()
        except OSError:
            return None
        checksum, payload = data[:_DIGEST_SIZE], data[_DIGEST_SIZE:]
        if hashlib.sha256(payload).digest() == checksum:
            return payload
        _remove(path)
        return None

    def write(self, kind: str, key: str, payload: bytes) -> None:
        """Stores an entry. What cannot be stored is only made again next time."""
        self._writing(lambda: self._write(self._entry(kind, key), hashlib.sha256(payload).digest() + payload))

    def folder(self, kind: str, key: str, make: Callable[[Path], None]) -> Path:
        """The folder of ``key``, where need be made by ``make(directory)``. Raises what ``make`` raises, or ``OSError``."""
        final = self.root / kind / key
        if _intact(final):
            return final
        return self._writing(lambda: self._make_folder(kind, key, make), must=True) or self.root / kind / key

    def size(self) -> tuple[int, int]:
        """The number of entries and folders, and their bytes."""
        count = total = 0
        for path in self._files():
            try:
                total += path.stat().st_size
            except OSError:
                continue
            count += path.name == _MANIFEST or not (path.parent / _MANIFEST).exists()
        return count, total

    def clear(self) -> tuple[int, int]:
        """Removes everything that is cached and returns what ``size`` was. The directory itself stays."""
        before = self.size()
        for child in self.root.iterdir() if self.root.is_dir() else ():
            if child.is_dir() and not child.is_symlink():
                _remove(child)
        return before

    def _files(self) -> Iterator[Path]:
        for folder, _, names in os.walk(self.root):
            yield from (Path(folder) / name for name in names)

    def _entry(self, kind: str, key: str) -> Path:
        return self.root / kind / key[:2] / key[2:]

    def _write(self, path: Path, data: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".new-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.replace(name, path)
        except BaseException:
            _remove(Path(name))
            raise

    def _make_folder(self, kind: str, key: str, make: Callable[[Path], None]) -> Path:
        parent = self.root / kind
        parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        made = Path(tempfile.mkdtemp(dir=parent, prefix=".new-"))
        try:
            make(made)
            _write_manifest(made)
            return _publish(made, parent / key)
        except BaseException:
            _remove(made)
            raise

    def _writing(self, action: Callable[[], Path | None], must: bool = False) -> Path | None:
        """Runs an action that writes below ``root``; when that fails, once more below a temporary directory."""
        try:
            return action()
        except OSError as error:
            if self.root in _temporary:
                if must:
                    raise
                return None
            self.root = _temporary_root(self.root, error.strerror or str(error))
        return self._writing(action, must)


_caches: dict[Path, Cache] = {}
_temporary: set[Path] = set()


def _usable(root: Path) -> Cache:
    try:
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = root.stat()
        if not os.access(root, os.W_OK | os.X_OK):
            fault = "it is read-only"
        elif hasattr(os, "geteuid") and status.st_uid != os.geteuid():
            fault = "it belongs to another user"
        elif status.st_mode & 0o002:
            fault = "everybody may write to it"
        else:
            return Cache(root)
    except OSError as error:
        fault = error.strerror or str(error)
    return Cache(_temporary_root(root, fault))


def _temporary_root(root: Path, fault: str) -> Path:
    warnings.warn(
        f"the cache {root} cannot be used: {fault}. Kernels are built in a temporary directory and again by every process. "
        f"Set {VARIABLE} to a directory of yours that can be written.",
        CacheUnavailable,
        stacklevel=3,
    )
    made = Path(tempfile.mkdtemp(prefix="weft-"))
    _temporary.add(made)
    owner = os.getpid()
    atexit.register(lambda: _remove(made) if os.getpid() == owner else None)
    return made


def _publish(made: Path, final: Path) -> Path:
    """Renames a finished folder into place. One that another process has put there meanwhile is as good; a damaged one goes."""
    for _ in range(3):
        try:
            os.rename(made, final)
            return final
        except OSError:
            if not final.exists():
                raise
            if _intact(final):
                _remove(made)
                return final
            _remove(final)
    raise OSError(f"{final} cannot be replaced")


def _write_manifest(folder: Path) -> None:
    sums = {path.name: _checksum(path) for path in sorted(folder.iterdir()) if path.is_file()}
    (folder / _MANIFEST).write_text(json.dumps(sums, indent=1))


def _intact(folder: Path) -> bool:
    try:
        sums = json.loads((folder / _MANIFEST).read_text())
        return bool(sums) and all(_checksum(folder / name) == checksum for name, checksum in sums.items())
    except (OSError, ValueError, AttributeError):
        return False


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _user() -> str:
    return str(os.geteuid()) if hasattr(os, "geteuid") else "user"
