"""Paths that users give, and the one they need not give."""

import os
import sys
from pathlib import Path
from typing import TypeAlias

AnyPath: TypeAlias = str | os.PathLike[str]


def expand(path: AnyPath) -> Path:
    """A path with ``~`` replaced; that of a user there is not stays as it is, and is then not found."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 - pathlib's raises RuntimeError for an unknown user


def is_path(source: AnyPath) -> bool:
    """Whether a source means a path rather than a reference: it contains a slash, or exists."""
    if not isinstance(source, str) or "/" in source or source in (".", ".."):
        return True
    try:
        return source != "" and expand(source).exists()
    except (OSError, ValueError):
        return False  # too long for a file name, say: then no file has it


def default_store() -> Path:
    """``LORAFORGE_STORE``, or the platform's data directory."""
    named = os.environ.get("LORAFORGE_STORE")
    if named:
        return expand(named)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "loraforge"
    data = os.environ.get("XDG_DATA_HOME")
    return (Path(data) if data else Path.home() / ".local" / "share") / "loraforge"
