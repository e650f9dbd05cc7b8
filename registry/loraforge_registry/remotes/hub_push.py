"""An artifact into a repository on the Hub: one commit on top of the one that was seen, compared, then the tag.

Only files that differ are part of the commit, and the hub's client sends only what the hub does not have; so a push
that was cut off is run again, and a second one sends nothing.
"""

import io
import logging
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from loraforge_registry.config import MAX_BYTES, parse_config
from loraforge_registry.digest import Digest
from loraforge_registry.errors import ConflictError, FormatError, LoraforgeError, NotFoundError, RemoteError, StoreError
from loraforge_registry.git import git_id
from loraforge_registry.hub_record import Record, encode_record
from loraforge_registry.hub_tree_record import TreeOnHub
from loraforge_registry.ingest import MAX_README
from loraforge_registry.manifest import CONFIG_FILE, README_FILE, RECORD_FILE, WEIGHTS_FILE, File, Manifest
from loraforge_registry.names import DEFAULT_TAG, RefName
from loraforge_registry.remotes.card import card, lacks_base, with_front_matter
from loraforge_registry.remotes.hub import HubRemote, refused
from loraforge_registry.remotes.hub_answers import HubFile, Snapshot
from loraforge_registry.remotes.hub_offers import MAIN, describes
from loraforge_registry.remotes.offer import Published
from loraforge_registry.serving import refused_by_vllm, vllm_flags
from loraforge_registry.store import Store

_OURS = (CONFIG_FILE, WEIGHTS_FILE, README_FILE, RECORD_FILE)
HARMLESS = (".gitattributes", ".gitignore", "LICENSE", "LICENSE.md", "LICENSE.txt")
MODELS = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True, slots=True)
class Goal:
    """Where a push leads: a branch, and a tag or none."""

    branch: str
    tag: str | None


def publish(remote: HubRemote, store: Store, digest: Digest, name: RefName | None, *, force: bool) -> Published:
    """Put an artifact at the root of a repository, which is made where it is missing.

    Raises:
        ConflictError: the tag means something else, the branch moved meanwhile, or a README that a person wrote is
            in the way; with ``force`` the first and the last are replaced.
        RemoteError: the hub says no, breaks off, or has other bytes afterwards than were sent.
    """
    check_token(remote)
    with store.reading(digest):
        manifest = store.manifest(digest)
        head, created = head_of(remote)
        goal, done = goal_of(remote, digest, name, force=force)
        notes = [*created, *_serving_notes(store, manifest)]
        if done is not None:
            return Published(str(remote.address.at(done)), 0, manifest.size, tuple(notes))
        head = head if goal.branch == MAIN else remote.snapshot(goal.branch)
        _check_strangers(remote, head, notes, force=force)
        wanted = _wanted(remote, store, digest, manifest, head, notes, force=force)
        commit, sent, skipped = commit_files(remote, store, {**wanted, WEIGHTS_FILE: manifest}, head, goal)
        if goal.tag is not None:
            set_tag(remote, goal.tag, commit)
    return Published(str(remote.address.at(goal.tag or commit)), sent, skipped, tuple(notes))


def check_token(remote: HubRemote) -> None:
    """Refuse to push without a token."""
    if not remote.client.token:
        raise RemoteError(f"{remote.address}: a push needs a token; log in with hf auth login, or set HF_TOKEN")


def head_of(remote: HubRemote) -> tuple[Snapshot, list[str]]:
    """Return what is on the main branch now; a repository that is not there is made."""
    try:
        return remote.snapshot(MAIN), []
    except NotFoundError:
        with _client(remote) as api:
            api.create_repo(remote.address.repo, private=remote.private or None, exist_ok=True)
    kind = "private" if remote.private else "public, unless your organisation says otherwise"
    return remote.snapshot(MAIN), [f"made the repository {remote.client.host}/{remote.address.repo} ({kind})"]


def goal_of(remote: HubRemote, digest: Digest, name: RefName | None, *, force: bool) -> tuple[Goal, str | None]:
    """Return where to push to, and the tag that means this artifact already, if there is one."""
    tags, branches = remote.refs()
    wanted = remote.address.revision
    if wanted is not None and wanted in branches:
        return Goal(wanted, None), None
    tag = wanted or (name.tag if name is not None and name.tag != DEFAULT_TAG else None)
    if tag is None or tag not in tags:
        return Goal(MAIN, tag), None
    snapshot = remote.snapshot(tags[tag])
    record = _record_of(remote, snapshot) or tree_of(remote, snapshot)
    if record is not None and record.digest == digest:
        return Goal(MAIN, tag), tag
    if not force:
        what = f"sha256:{record.digest.short}" if record else f"the commit {snapshot.commit[:12]}"
        said = f"the tag {tag} in {remote.address} is {what}, this is sha256:{digest.short}"
        raise ConflictError(f"{said}: choose another tag, or --force")
    return Goal(MAIN, tag), None


def _record_of(remote: HubRemote, snapshot: Snapshot) -> Record | None:
    """The record at a commit, if it is a good one about what is there."""
    try:
        record = remote.record(snapshot)
    except FormatError:
        return None
    there = {CONFIG_FILE, WEIGHTS_FILE} <= set(snapshot.files)
    return record if record is not None and there and describes(record, snapshot) else None


def tree_of(remote: HubRemote, snapshot: Snapshot) -> TreeOnHub | None:
    """The record of a tree at a commit, if it is a good one."""
    try:
        return remote.tree_record(snapshot)
    except FormatError:
        return None


def _serving_notes(store: Store, manifest: Manifest) -> Iterator[str]:
    config, layout = parse_config(store.read_file(manifest.file(CONFIG_FILE), MAX_BYTES)), store.layout(manifest)
    refused = list(refused_by_vllm(config, layout))
    if refused:
        yield f"vLLM will not serve this adapter: {'; '.join(refused)}"
    elif flags := vllm_flags(config, layout):
        yield f"vLLM serves this adapter with {flags}"


def _check_strangers(remote: HubRemote, head: Snapshot, notes: list[str], *, force: bool) -> None:
    """A repository with another model in it is not written to; other files stay, and are named."""
    others = sorted(name for name in head.files if name not in _OURS + HARMLESS)
    models = [name for name in others if name == "config.json" or name.endswith(MODELS)]
    if models and CONFIG_FILE not in head.files and not force:
        raise ConflictError(
            f"{remote.address} holds {', '.join(models[:3])} and no adapter; name another repository, or --force"
        )
    if others:
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        notes.append(f"left there as they are: {', '.join(others[:5])}{more}; whoever loads the adapter gets them, too")


def _wanted(
    remote: HubRemote,
    store: Store,
    digest: Digest,
    manifest: Manifest,
    head: Snapshot,
    notes: list[str],
    *,
    force: bool,
) -> Mapping[str, bytes]:
    """The small files as they are to be in the repository."""
    config = store.read_file(manifest.file(CONFIG_FILE), MAX_BYTES)
    wanted = {CONFIG_FILE: config}
    own = next((file for file in manifest.files if file.path == README_FILE), None)
    if own is None:
        readme = card(remote.address.repo, digest, manifest, parse_config(config), store.layout(manifest))
    else:
        text = store.read_file(own, MAX_README)
        check_text(text)
        readme = with_front_matter(text, manifest)
        if lacks_base(readme, manifest):
            notes.append("README.md does not name base_model, so the Hub will not list the adapter under its base")
    if may_write_readme(remote, head, readme, _record_of(remote, head), notes, own=own is not None, force=force):
        wanted[README_FILE] = readme
    git = {path: git_id([data], len(data)) for path, data in wanted.items()}
    wanted[RECORD_FILE] = encode_record(Record(digest, manifest, git))
    return wanted


def check_text(readme: bytes) -> None:
    """Refuse a README that the Hub would."""
    try:
        readme.decode()
    except UnicodeDecodeError as error:
        raise FormatError(f"its README.md is not UTF-8 at byte {error.start}, which the Hub does not take") from error


def may_write_readme(
    remote: HubRemote,
    head: Snapshot,
    readme: bytes,
    before: Record | TreeOnHub | None,
    notes: list[str],
    *,
    own: bool,
    force: bool,
) -> bool:
    """Whether README.md is ours to write: what a person wrote on the hub is never replaced unasked.

    ``before`` is the record that is there; with ``own`` the README belongs to what is pushed.
    """
    there = head.files.get(README_FILE)
    if there is None or force or _is(there, readme):
        return True
    if before is not None and there.git_id is not None and before.git.get(README_FILE) == there.git_id:
        return True
    if own:
        raise ConflictError(
            f"{remote.address} has a README.md that was not pushed by loraforge, and the adapter has another; "
            "--force replaces it (the Hub keeps the old one in its history)"
        )
    notes.append("README.md was written by somebody else: kept as it is (--force replaces it)")
    return False


def commit_files(
    remote: HubRemote,
    store: Store,
    wanted: Mapping[str, bytes | Manifest],
    head: Snapshot,
    goal: Goal,
    gone: Iterable[str] = (),
) -> tuple[str, int, int]:
    """Make one commit after which these files are there, where one is needed, and those that are ``gone`` are not.

    A manifest stands for its weights. Returns the commit, and the bytes that were sent and that were there.
    """
    differing = {name: data for name, data in wanted.items() if not _is_there(head.files.get(name), store, data)}
    size, deletions = sum(map(_size, wanted.values())), [CommitOperationDelete(name) for name in gone]
    if not differing and not deletions:
        return head.commit, 0, size
    readers = {name: _Counted(_source(store, data)) for name, data in differing.items()}
    additions = [CommitOperationAdd(name, reader) for name, reader in readers.items()]
    for addition in additions:
        _check_undamaged(store, addition, differing[addition.path_in_repo])
    for reader in readers.values():
        reader.count = 0  # until here it was only hashed
    with _client(remote) as api:
        title = f"loraforge push {goal.tag or ''}".strip()
        info = api.create_commit(
            remote.address.repo,
            [*additions, *deletions],
            commit_message=title,
            revision=goal.branch,
            parent_commit=head.commit,
        )
    _compare(remote, remote.snapshot(info.oid), store, wanted)
    sent = sum(_sent(readers[name], data) for name, data in differing.items())
    return info.oid, sent, size - sent


def _sent(reader: "_Counted", data: bytes | Manifest) -> int:
    """The bytes of a file that went over the wire: small ones are read once more for their hash, and all go."""
    return len(data) if isinstance(data, bytes) else min(reader.count, _size(data))


def _size(data: bytes | Manifest) -> int:
    return len(data) if isinstance(data, bytes) else data.file(WEIGHTS_FILE).size


def _source(store: Store, data: bytes | Manifest) -> io.RawIOBase:
    return cast("io.RawIOBase", io.BytesIO(data)) if isinstance(data, bytes) else _Stored(store, data)


def _check_undamaged(store: Store, addition: CommitOperationAdd, data: bytes | Manifest) -> None:
    if isinstance(data, Manifest) and addition.upload_info.sha256 != data.file(WEIGHTS_FILE).digest.raw:
        digest = data.file(WEIGHTS_FILE).digest
        raise StoreError(f"{store.path}: the bytes stored as {digest} are damaged; nothing was sent")


def _compare(remote: HubRemote, after: Snapshot, store: Store, wanted: Mapping[str, bytes | Manifest]) -> None:
    """Every file is on the hub as it was meant to be, by the hub's own hashes."""
    wrong = [name for name, data in wanted.items() if not _is_there(after.files.get(name), store, data)]
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        said = f"{', '.join(wrong[:4])}{more} did not arrive as sent; push again"
        raise RemoteError(f"{remote.address.at(after.commit)}: {said}")


def set_tag(remote: HubRemote, tag: str, commit: str) -> None:
    """Let a tag mean a commit, where it does not already."""
    tags, _ = remote.refs()
    if tags.get(tag) == commit:
        return
    with _client(remote) as api:
        if tag in tags:
            api.delete_tag(remote.address.repo, tag=tag)
        api.create_tag(remote.address.repo, tag=tag, revision=commit)


def _is_there(there: HubFile | None, store: Store, data: bytes | Manifest) -> bool:
    return _is(there, data) if isinstance(data, bytes) else _are(there, store, data.file(WEIGHTS_FILE))


def _is(there: HubFile | None, data: bytes) -> bool:
    if there is None or there.size != len(data):
        return False
    return there.sha256 == Digest.of(data) if there.sha256 else there.git_id == git_id([data], len(data))


def _are(there: HubFile | None, store: Store, weights: File) -> bool:
    """As ``_is``, of the weights."""
    if there is None or there.size != weights.size:
        return False
    return (
        there.sha256 == weights.digest if there.sha256 else there.git_id == git_id(store.chunks(weights), weights.size)
    )


class _Counted(io.BufferedReader):
    """A file that counts what is read; as it is no path, the hub's client keeps to plain HTTP, which any hub speaks."""

    count = 0

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self.count += len(data)
        return data


class _Stored(io.RawIOBase):
    """The weights of an artifact, open only while they are read: a tree has more files than a process may open."""

    def __init__(self, store: Store, manifest: Manifest) -> None:
        super().__init__()
        self._store, self._manifest, self._position = store, manifest, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: _size(self._manifest)}[whence]
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any, /) -> int:  # noqa: ANN401 - a writable buffer, which 3.11 cannot spell
        with self._store.open_weights(self._manifest) as fd:
            count = os.preadv(fd, [buffer], self._position)
        self._position += count
        return count


@contextmanager
def _client(remote: HubRemote) -> Iterator[HfApi]:
    """The hub's own client; what it raises becomes a sentence, and it says nothing by itself."""
    logger = logging.getLogger("huggingface_hub")
    level, bars = logger.level, are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of its own calls
            yield HfApi(endpoint=remote.client.endpoint, token=remote.client.token)
    except LoraforgeError:
        raise
    except _failures() as error:
        raise _said(remote, error) from None
    finally:
        logger.setLevel(level)
        if not bars:
            enable_progress_bars()


def _failures() -> tuple[type[Exception], ...]:
    """What the hub's client raises where it is refused or gets no answer; its errors' base is httpx's, or requests'."""
    found = [base for base in HfHubHTTPError.__mro__ if base.__name__ in ("HTTPError", "RequestException")]
    return OSError, ValueError, RuntimeError, *(base for base in found if issubclass(base, Exception))


def _said(remote: HubRemote, error: BaseException) -> LoraforgeError:
    if not isinstance(error, HfHubHTTPError):
        if isinstance(error.__cause__, _failures()):
            return _said(remote, error.__cause__)  # "error while uploading" from the reason
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        reason = remote.client.clean(" ".join(reason.split())) or type(error).__name__
        return RemoteError(f"{remote.address}: {reason}; run it again, it sends only what is missing")
    response = error.response
    status, code = response.status_code, response.headers.get("X-Error-Code", "")
    message = remote.client.clean((error.server_message or "").replace("\n", " "))
    if status == 412:
        return ConflictError(f"{remote.address} moved on while this was pushed, and stays as it is; push again")
    if status == 409:
        return ConflictError(f"{remote.address}: {message or 'it is there already'}")
    return refused(remote, str(remote.address), status, code, message)
