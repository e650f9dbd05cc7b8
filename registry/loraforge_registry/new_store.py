"""A new store: its directories, made durable, and behind them the marker that says that this is one."""

import fcntl
import os
import secrets
import stat
from pathlib import Path

from loraforge_registry import locks
from loraforge_registry.errors import StoreError
from loraforge_registry.locks import LOCK, LOCKS
from loraforge_registry.system import NEW, READ, named_error, naming, sync_path, write_all

FORMAT = b"loraforge-store 1\n"
AREAS = ("blobs/sha256", "manifests/sha256")
DIRECTORIES = ("blobs", "manifests", *AREAS, "refs", "reflog", "sessions", "tmp", "trash", "quarantine", "locks")
SHARDS = tuple(f"{shard:02x}" for shard in range(256))


def make_store(root: Path) -> None:
    """Turn an empty or absent directory into a store; finish one that a crash left unmarked.

    Every shard directory exists and is durable before FORMAT says that this is a store.

    Raises:
        StoreError: the directory holds something else.
        InputOutputError: it cannot be made.
    """
    with naming(root):
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        if check_format(root):  # another process has made it since
            return
        strangers = sorted(
            set(os.listdir(root)) - {d.partition("/")[0] for d in DIRECTORIES} - {"index.sqlite", "FORMAT"}
        )
        if strangers:
            raise StoreError(
                f"{root} holds {strangers[0]!r} and is not a loraforge store; name an empty or absent directory"
            )
        shards = [f"{area}/{shard}" for area in AREAS for shard in SHARDS]
        for directory in (*DIRECTORIES, *shards):
            (root / directory).mkdir(mode=0o700, exist_ok=True)
        for name in LOCKS:
            os.close(os.open(root / "locks" / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    for directory in ("", *DIRECTORIES):
        sync_path(root / directory)
    sync_path(root.parent)
    _write_format(root)


def check_format(root: Path) -> bool:
    """Whether a store is there.

    Raises:
        StoreError: the marker is another format's, or a directory with other things in it has none.
    """
    try:
        fd = os.open(root / "FORMAT", READ)
    except FileNotFoundError:
        if (root / "blobs").is_dir() and (root / "refs").is_dir() and any((root / "refs").iterdir()):
            raise StoreError(
                f"{root} has refs but no FORMAT file; it is damaged: copy FORMAT from another store"
            ) from None
        return False
    except NotADirectoryError as error:
        raise StoreError(f"{root} is not a directory") from error
    except OSError as error:
        raise named_error(error, root / "FORMAT") from error
    try:
        found = os.read(fd, 200) if stat.S_ISREG(os.fstat(fd).st_mode) else b""
    finally:
        os.close(fd)
    if found != FORMAT:
        raise StoreError(f"{root}/FORMAT says {found[:60]!r}, this version reads {FORMAT!r}: upgrade loraforge")
    return True


def _write_format(root: Path) -> None:
    temporary = root / "tmp" / secrets.token_hex(12)
    with naming(root / "FORMAT"):
        lock = os.open(root / "locks" / "gc", LOCK)
        try:
            locks.flock(lock, fcntl.LOCK_SH)  # where another process has just made this store, it may collect already
            fd = os.open(temporary, NEW, 0o600)
            try:
                write_all(fd, FORMAT)
                os.fchmod(fd, 0o444)
                os.fsync(fd)
                temporary.replace(root / "FORMAT")
            finally:
                os.close(fd)
        finally:
            os.close(lock)
    sync_path(root)
