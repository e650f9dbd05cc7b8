"""An artifact written out as a plain directory, every byte checked on the way."""

import hashlib
import os
import secrets
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from loraforge_registry import objects
from loraforge_registry.errors import ConflictError, InputOutputError
from loraforge_registry.files import Files
from loraforge_registry.manifest import File, Manifest
from loraforge_registry.system import Buffer, named_error, remove_path, write_new


def export(files: Files, manifest: Manifest, target: Path) -> None:
    """Write the files of an artifact into the directory ``target``.

    Raises:
        ConflictError: ``target`` exists with other contents; nothing is touched.
        StoreError: a stored file is damaged; nothing is left at ``target``.
        InputOutputError: it cannot be written.
    """
    _export(files, {file.path: file for file in manifest.files}, target)


def export_tree(files: Files, nodes: Mapping[str, Manifest], target: Path) -> None:
    """Write the adapters of a tree, each into the directory that is its path below ``target``; raises as ``export``."""
    _export(files, {f"{path}/{file.path}": file for path, node in nodes.items() for file in node.files}, target)


def _export(files: Files, wanted: Mapping[str, File], target: Path) -> None:
    if target.resolve().is_relative_to(files.root.resolve()):
        raise ConflictError(f"{target} is inside the store {files.root}; name a directory elsewhere")
    if _holds_exactly(target, wanted):
        return

    def chunks_of(file: File) -> Callable[[], Iterable[Buffer]]:
        return lambda: objects.verified(files, objects.BLOBS, file.digest, file.size)

    write_directory(target, {path: chunks_of(file) for path, file in wanted.items()})


def write_directory(target: Path, contents: Mapping[str, Callable[[], Iterable[Buffer]]]) -> None:
    """Write files, by their path below it, into a new directory, which appears complete or not at all.

    Raises:
        ConflictError: ``target`` exists and is not an empty directory.
        InputOutputError: it cannot be written; nothing is left.
    """
    if target.is_symlink() or (target.exists() and not (target.is_dir() and not any(target.iterdir()))):
        raise ConflictError(f"{target} exists already; name a new directory, or remove it first")
    if target.exists() and target.samefile("."):
        raise ConflictError(f"{target} is the working directory, which cannot be replaced; name a new directory")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = target.parent / f".{target.name[:100]}.{secrets.token_hex(8)}"
        staging.mkdir()
    except OSError as error:
        raise named_error(error, target.parent) from error
    try:
        inner = sorted({parent for name in contents for parent in (staging / name).parents if parent > staging})
        for directory in inner:
            directory.mkdir()
        for name, chunks in contents.items():
            write_new(staging / name, chunks())
        for directory in (*reversed(inner), staging):
            _sync(directory)
        staging.replace(target)  # over an empty directory, or nothing
        _sync(target.parent)
    except OSError as error:
        if isinstance(error, InputOutputError):
            raise
        raise named_error(error, target) from error
    finally:
        _discard(staging)


def write_file(target: Path, contents: Callable[[], Iterable[Buffer]]) -> int:
    """Write a new file, which appears complete or not at all, and return its size; the same again is no conflict.

    Raises:
        ConflictError: ``target`` exists with other contents.
        InputOutputError: it cannot be written; nothing is left.
    """
    staging = target.parent / f".{target.name[:100]}.{secrets.token_hex(8)}"
    try:
        write_new(staging, contents())
        try:
            os.link(staging, target)  # never over what is there
        except FileExistsError:
            if not _is_same(staging, target):
                raise ConflictError(f"{target} exists already; name a new file, or remove it first") from None
        _sync(target.parent)
        return staging.stat().st_size
    except OSError as error:
        if isinstance(error, InputOutputError):
            raise
        raise named_error(error, target) from error
    finally:
        remove_path(staging)


def replace_file(target: Path, data: Buffer) -> None:
    """Write a file in place of what is there: it is the old one or the new one at any moment.

    Raises:
        InputOutputError: it cannot be written; the old one stays.
    """
    staging = target.parent / f".{target.name[:100]}.{secrets.token_hex(8)}"
    try:
        write_new(staging, [data])
        staging.replace(target)
        _sync(target.parent)
    except OSError as error:
        if isinstance(error, InputOutputError):
            raise
        raise named_error(error, target) from error
    finally:
        remove_path(staging)


def _is_same(one: Path, other: Path) -> bool:
    if other.is_symlink() or not other.is_file() or one.stat().st_size != other.stat().st_size:
        return False
    with one.open("rb") as first, other.open("rb") as second:
        return hashlib.file_digest(first, "sha256").digest() == hashlib.file_digest(second, "sha256").digest()


def _discard(staging: Path) -> None:
    """Remove what an error left, which is then what to say; after success nothing has this name."""
    with suppress(OSError):
        for path in sorted(staging.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        staging.rmdir()


def _holds_exactly(target: Path, wanted: Mapping[str, File]) -> bool:
    """Whether a directory holds these files and no others already: writing it again is then no conflict."""
    if target.is_symlink() or not target.is_dir():
        return False
    if {str(p.relative_to(target)) for p in target.rglob("*") if p.is_symlink() or not p.is_dir()} != set(wanted):
        return False
    return all(_is_file(target / name, file) for name, file in wanted.items())


def _is_file(path: Path, file: File) -> bool:
    if path.is_symlink() or not path.is_file() or path.stat().st_size != file.size:
        return False
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest() == file.digest.hex


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
