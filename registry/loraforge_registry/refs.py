"""Names for artifacts: moved by compare-and-swap, with a history of every move (SPEC.md section 5)."""

import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import quote, unquote

from loraforge_registry.digest import Digest
from loraforge_registry.errors import ConflictError, NotFoundError, ReferenceSyntaxError, StoreError
from loraforge_registry.files import Files
from loraforge_registry.names import RefName
from loraforge_registry.sessions import Session

_LINE = 72  # "sha256:", 64 digits, a newline
_LATEST = 253_402_300_799  # the end of the year 9999: what a date can show


@dataclass(frozen=True, slots=True)
class Move:
    """One record of a reflog: at ``time`` (unix seconds) ``tag`` went from ``old`` to ``new``."""

    time: int
    old: Digest | None
    new: Digest | None
    tag: str
    who: str
    what: str


def read_ref(files: Files, ref: RefName) -> Digest | None:
    """Return what a ref points at, or None.

    Raises:
        StoreError: the ref file is damaged; others are not affected.
    """
    data = files.read("refs", file_name(ref), _LINE + 1)
    if data is None:
        return None
    try:
        if data[-1:] != b"\n":
            raise ReferenceSyntaxError("no newline at its end")
        digest = Digest.parse(data[:-1].decode("ascii"))
        if digest.algorithm != "sha256":
            raise ReferenceSyntaxError(f"{digest.algorithm} does not name an artifact")
    except (ReferenceSyntaxError, UnicodeDecodeError) as error:
        raise StoreError(f"the ref {ref} is damaged ({files.root / 'refs' / file_name(ref)}): {error}") from error
    return digest


def list_refs(files: Files) -> Iterator[tuple[RefName, Digest | StoreError]]:
    """Yield every ref, sorted, with what it points at, or the error that reading it gave."""
    for file_name in files.names("refs"):
        name, _, tag = file_name.partition("@")
        try:
            ref = RefName(name, tag)
            digest = read_ref(files, ref)
        except ReferenceSyntaxError:
            continue  # not a ref's file name: not ours
        except StoreError as error:
            yield ref, error
            continue
        if digest is not None:
            yield ref, digest


def move_ref(
    files: Files,
    session: Session,
    ref: RefName,
    *,
    expected: Digest | None,
    new: Digest | None,
    who: str = "",
    what: str = "tag",
) -> None:
    """Point ``ref`` at ``new`` (None removes it) if it points at ``expected`` now; durable when this returns.

    Raises:
        ConflictError: it points elsewhere; somebody else moved it.
        NotFoundError: there is nothing to remove.
        StoreError: it exists, and locks keep nobody out here, so that another's move could be lost.
    """
    with files.lock("refs") as alone:
        old = read_ref(files, ref)
        if old != expected:
            raise ConflictError(f"{ref} is {_spell(old)}, expected {_spell(expected)}: it was moved meanwhile")
        if old is None and new is None:
            raise NotFoundError(f"there is no {ref}")
        if old is not None and not alone:
            raise StoreError(
                f"{files.root}: flock keeps nobody out on this file system, so moving {ref} could lose another's move; "
                "use a new tag, or keep the store elsewhere"
            )
        files.append("reflog", ref.name, _record(Move(int(time.time()), old, new, ref.tag, who, what)))
        if new is None:
            files.remove("refs", file_name(ref))
        else:
            _publish(files, session, ref, new, replace=old is not None)
        files.sync("refs")


def read_reflog(files: Files, name: str) -> list[Move]:
    """Return the moves of a name's tags, oldest first; damaged lines are passed over."""
    return [move for line in _lines(files, name) if (move := _parse_record(line)) is not None]


def damaged_records(files: Files, name: str) -> int:
    """Count the lines of a reflog that are no records: a crash tore them, or the disk changed them."""
    return sum(line != b"" and _parse_record(line) is None for line in _lines(files, name))


def restore_ref(files: Files, session: Session, ref: RefName, digest: Digest) -> None:
    """Write a ref that is damaged again, under the lock; its history has the move already."""
    with files.lock("refs") as alone:
        if not alone:
            raise StoreError(f"{files.root}: flock keeps nobody out on this file system; {ref} was left as it is")
        try:
            read_ref(files, ref)
        except StoreError:
            files.keep_copy("refs", file_name(ref), "quarantine", f"{file_name(ref)}.{session.name}")
            _publish(files, session, ref, digest, replace=True)
            files.sync("refs")


def _lines(files: Files, name: str) -> list[bytes]:
    return (files.read("reflog", name, 64 * 1024 * 1024) or b"").split(b"\n")


def _publish(files: Files, session: Session, ref: RefName, new: Digest, *, replace: bool) -> None:
    temporary = files.new_temporary(session.name)
    try:
        files.write(temporary, f"{new}\n".encode())
        files.seal(temporary, 0o644)
        if replace:
            files.rename(temporary, "refs", file_name(ref))
        elif not files.link(temporary, "refs", file_name(ref)):  # the lock kept nobody out, the link does
            raise ConflictError(f"{ref} was made by somebody else meanwhile")
    finally:
        files.discard(temporary)


def file_name(ref: RefName) -> str:
    """What a ref's file is called."""
    return f"{ref.name}@{ref.tag}"


def _spell(digest: Digest | None) -> str:
    return "absent" if digest is None else str(digest)


def _record(move: Move) -> bytes:
    fields = [
        str(move.time),
        str(move.old or "-"),
        str(move.new or "-"),
        move.tag,
        quote(move.who, errors="backslashreplace"),  # a user's name need not be Unicode
        quote(move.what),
    ]
    text = " ".join(fields).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _parse_record(line: bytes) -> Move | None:
    crc, _, text = line.partition(b" ")
    fields = text.decode("ascii", "replace").split(" ")
    if len(fields) != 6 or crc != b"%08x" % zlib.crc32(text):
        return None
    when, old, new, tag, who, what = fields
    try:
        move = Move(int(when), _digest(old), _digest(new), RefName("any", tag).tag, unquote(who), unquote(what))
    except ValueError:
        return None
    return move if abs(move.time) <= _LATEST and _record(move) == line + b"\n" else None  # one spelling, one record


def _digest(text: str) -> Digest | None:
    return None if text == "-" else Digest.parse(text)
