"""What a reference means, and where a name may move: refs, repositories, digests by their beginning."""

import getpass
import os
from contextlib import suppress

from loraforge_registry import names, objects, refs
from loraforge_registry.digest import Digest
from loraforge_registry.errors import ConflictError, NotFoundError, ReferenceSyntaxError, StoreError
from loraforge_registry.files import Files
from loraforge_registry.names import Reference, RefName
from loraforge_registry.records import Records
from loraforge_registry.repositories import RepositoryRecord
from loraforge_registry.sessions import Session
from loraforge_registry.shown import repository_at, shown


def lookup(files: Files, name: RefName) -> Digest | None:
    """Return what a ref points at, or the adapter that a repository shows under that name; else None."""
    found = refs.read_ref(files, name)
    repository = _repository(files, name.name) if found is None or name.tag == names.DEFAULT_TAG else None
    return found if repository is None else shown(Records(files), name.name, repository).get(name.tag)


def resolve(files: Files, text: str) -> Digest:
    """Return the artifact that ``name[:tag]``, ``name@sha256:<hex>`` or ``sha256:<prefix>`` means.

    Raises:
        ReferenceSyntaxError: not a reference, or a prefix of several artifacts.
        NotFoundError: nothing there.
    """
    reference = Reference.parse(text)
    if reference.ref is not None:
        digest = lookup(files, reference.ref)
        if digest is None:
            raise missing(files, reference.ref)
        return digest
    found = _by_prefix(files, reference.prefix or "")
    if reference.name is not None and found not in _history(files, reference.name):
        raise NotFoundError(f"{reference.name} has never been {found}; leave the name out to mean it anyway")
    return found


def move(files: Files, session: Session, digest: Digest, name: RefName, *, force: bool, what: str) -> None:
    """Point a ref at what is complete, durable and pinned.

    The tag ``latest`` moves freely; any other moves only with ``force``, or to where it is already.

    Raises:
        ConflictError: the tag means another artifact, or the name is a repository's.
    """
    if _repository(files, name.name) is not None:
        raise ConflictError(
            f"{name.name} is a repository that a server keeps: push to it there, or choose another name"
        )
    moves_freely = force or name.tag == names.DEFAULT_TAG
    while True:
        old = refs.read_ref(files, name)
        if old == digest:
            return None
        if old is not None and not moves_freely:
            raise ConflictError(
                f"{name} is {old} already; this is {digest}: choose another tag, or move it with --force"
            )
        try:
            return refs.move_ref(files, session, name, expected=old, new=digest, who=who(), what=what)
        except ConflictError:
            continue  # somebody was faster: look again


def missing(files: Files, ref: RefName) -> NotFoundError:
    """The error for a name that is not there, with a way out: its other tags, or names that look like it."""
    import difflib  # noqa: PLC0415 - only on the way to an error

    known = [found for found, _ in refs.list_refs(files)]
    near = [str(found) for found in known if found.name == ref.name][:5]
    near = near or difflib.get_close_matches(str(ref), [str(found) for found in known], 3)
    return NotFoundError(f"there is no {ref} in {files.root}" + (f"; there is {', '.join(near)}" if near else ""))


def who() -> str:
    """The user's name, for the history."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return str(os.getuid())


def _repository(files: Files, name: str) -> RepositoryRecord | None:
    """The repository that a server keeps under a name, if one does."""
    with suppress(StoreError):  # a damaged ref is said by whoever needs it
        return repository_at(Records(files), refs.read_ref(files, RefName(name)))
    return None


def _by_prefix(files: Files, prefix: str) -> Digest:
    found = list(objects.list_digests(files, objects.MANIFESTS, prefix))
    if not found:
        raise NotFoundError(f"no artifact in {files.root} begins with sha256:{prefix}")
    if len(found) > 1:
        raise ReferenceSyntaxError(f"sha256:{prefix} is the beginning of {len(found)} artifacts; give more digits")
    return found[0]


def _history(files: Files, name: str) -> set[Digest | None]:
    return {d for move in refs.read_reflog(files, name) for d in (move.old, move.new)}
