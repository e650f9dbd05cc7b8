"""Paths that users give, and the one they need not give."""

import os
import sys
from pathlib import Path
from typing import TypeAlias

from loraforge_registry.errors import NotFoundError

AnyPath: TypeAlias = str | os.PathLike[str]


def expand(path: AnyPath) -> Path:
    """Return a path with ``~`` replaced.

    Raises:
        NotFoundError: there is no such user, or the path is empty: pathlib would take the current directory.
    """
    if not os.fspath(path):
        raise NotFoundError("an empty path; name a file or directory")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise NotFoundError(f"{path}: there is no such user's home") from error


def is_path(source: AnyPath) -> bool:
    """Whether a source means a path rather than a reference: it contains a slash, or exists."""
    if not isinstance(source, str) or "/" in source or source in (".", ".."):
        return True
    try:
        return source != "" and expand(source).exists()
    except (OSError, ValueError, NotFoundError):
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
