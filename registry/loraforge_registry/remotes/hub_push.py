"""An artifact into a repository on the Hub: one commit on top of the one that was seen, compared, then the tag.

Only files that differ are part of the commit, and the hub's client sends only what the hub does not have; so a push
that was cut off is run again, and a second one sends nothing.
"""

import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from loraforge_registry.config import MAX_BYTES, parse_config
from loraforge_registry.digest import Digest
from loraforge_registry.errors import ConflictError, FormatError, LoraforgeError, NotFoundError, RemoteError, StoreError
from loraforge_registry.git import git_id
from loraforge_registry.ingest import MAX_README
from loraforge_registry.manifest import CONFIG_FILE, README_FILE, WEIGHTS_FILE, File, Manifest
from loraforge_registry.names import DEFAULT_TAG, RefName
from loraforge_registry.remotes.card import card, lacks_base, with_front_matter
from loraforge_registry.remotes.hub import MAIN, HubFile, HubRemote, Snapshot, describes, refused
from loraforge_registry.remotes.offer import Published
from loraforge_registry.remotes.record import RECORD_FILE, Record, encode_record
from loraforge_registry.remotes.serving import refused_by_vllm, vllm_flags
from loraforge_registry.store import Store

_OURS = (CONFIG_FILE, WEIGHTS_FILE, README_FILE, RECORD_FILE)
_HARMLESS = (".gitattributes", ".gitignore", "LICENSE", "LICENSE.md", "LICENSE.txt")
_MODELS = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True, slots=True)
class _Goal:
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
    _check_token(remote)
    with store.reading(digest):
        manifest = store.manifest(digest)
        head, created = _head(remote)
        goal, done = _goal(remote, digest, name, force=force)
        notes = [*created, *_serving_notes(store, manifest)]
        if done is not None:
            return Published(str(remote.address.at(done)), 0, manifest.size, tuple(notes))
        head = head if goal.branch == MAIN else remote.snapshot(goal.branch)
        _check_strangers(remote, head, notes, force=force)
        wanted = _wanted(remote, store, digest, manifest, head, notes, force=force)
        commit, sent, skipped = _commit(remote, store, manifest, wanted, head, goal)
        if goal.tag is not None:
            _tag(remote, goal.tag, commit)
    return Published(str(remote.address.at(goal.tag or commit)), sent, skipped, tuple(notes))


def _check_token(remote: HubRemote) -> None:
    if not remote.client.token:
        raise RemoteError(f"{remote.address}: a push needs a token; log in with hf auth login, or set HF_TOKEN")


def _head(remote: HubRemote) -> tuple[Snapshot, list[str]]:
    """Return what is on the main branch now; a repository that is not there is made."""
    try:
        return remote.snapshot(MAIN), []
    except NotFoundError:
        with _client(remote) as api:
            api.create_repo(remote.address.repo, private=remote.private or None, exist_ok=True)
    kind = "private" if remote.private else "public, unless your organisation says otherwise"
    return remote.snapshot(MAIN), [f"made the repository {remote.client.host}/{remote.address.repo} ({kind})"]


def _goal(remote: HubRemote, digest: Digest, name: RefName | None, *, force: bool) -> tuple[_Goal, str | None]:
    """Return where to push to, and the tag that means this artifact already, if there is one."""
    tags, branches = remote.refs()
    wanted = remote.address.revision
    if wanted is not None and wanted in branches:
        return _Goal(wanted, None), None
    tag = wanted or (name.tag if name is not None and name.tag != DEFAULT_TAG else None)
    if tag is None or tag not in tags:
        return _Goal(MAIN, tag), None
    snapshot = remote.snapshot(tags[tag])
    record = _record_of(remote, snapshot)
    if record is not None and record.digest == digest:
        return _Goal(MAIN, tag), tag
    if not force:
        what = f"sha256:{record.digest.short}" if record else f"the commit {snapshot.commit[:12]}"
        said = f"the tag {tag} in {remote.address} is {what}, this is sha256:{digest.short}"
        raise ConflictError(f"{said}: choose another tag, or --force")
    return _Goal(MAIN, tag), None


def _record_of(remote: HubRemote, snapshot: Snapshot) -> Record | None:
    """The record at a commit, if it is a good one about what is there."""
    try:
        record = remote.record(snapshot)
    except FormatError:
        return None
    there = {CONFIG_FILE, WEIGHTS_FILE} <= set(snapshot.files)
    return record if record is not None and there and describes(record, snapshot) else None


def _serving_notes(store: Store, manifest: Manifest) -> Iterator[str]:
    config, layout = parse_config(store.read_file(manifest.file(CONFIG_FILE), MAX_BYTES)), store.layout(manifest)
    refused = list(refused_by_vllm(config, layout))
    if refused:
        yield f"vLLM will not serve this adapter: {'; '.join(refused)}"
    elif flags := vllm_flags(layout):
        yield f"vLLM serves this adapter with {flags}"


def _check_strangers(remote: HubRemote, head: Snapshot, notes: list[str], *, force: bool) -> None:
    """A repository with another model in it is not written to; other files stay, and are named."""
    others = sorted(name for name in head.files if name not in _OURS + _HARMLESS)
    models = [name for name in others if name == "config.json" or name.endswith(_MODELS)]
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
        readme = card(remote.address.repo, digest, manifest, store.layout(manifest))
    else:
        text = store.read_file(own, MAX_README)
        _check_text(text)
        readme = with_front_matter(text, manifest)
        if lacks_base(readme, manifest):
            notes.append("README.md does not name base_model, so the Hub will not list the adapter under its base")
    if _may_write_readme(remote, head, readme, own, notes, force=force):
        wanted[README_FILE] = readme
    git = {path: git_id([data], len(data)) for path, data in wanted.items()}
    wanted[RECORD_FILE] = encode_record(Record(digest, manifest, git))
    return wanted


def _check_text(readme: bytes) -> None:
    try:
        readme.decode()
    except UnicodeDecodeError as error:
        raise FormatError(f"its README.md is not UTF-8 at byte {error.start}, which the Hub does not take") from error


def _may_write_readme(
    remote: HubRemote, head: Snapshot, readme: bytes, own: File | None, notes: list[str], *, force: bool
) -> bool:
    """Whether README.md is ours to write: what a person wrote on the hub is never replaced unasked."""
    there = head.files.get(README_FILE)
    if there is None or force or _is(there, readme):
        return True
    before = _record_of(remote, head)
    if before is not None and there.git_id is not None and before.git.get(README_FILE) == there.git_id:
        return True
    if own is not None:
        raise ConflictError(
            f"{remote.address} has a README.md that was not pushed by loraforge, and the adapter has another; "
            "--force replaces it (the Hub keeps the old one in its history)"
        )
    notes.append("README.md was written by somebody else: kept as it is (--force replaces it)")
    return False


def _commit(
    remote: HubRemote, store: Store, manifest: Manifest, wanted: Mapping[str, bytes], head: Snapshot, goal: _Goal
) -> tuple[str, int, int]:
    """Make the commit, where one is needed; return it, with the bytes that were sent and that were there."""
    weights = manifest.file(WEIGHTS_FILE)
    differing = {name: data for name, data in wanted.items() if not _is(head.files.get(name), data)}
    small, size = sum(map(len, differing.values())), sum(map(len, wanted.values())) + weights.size
    same_weights = _are(head.files.get(WEIGHTS_FILE), store, weights)
    if not differing and same_weights:
        return head.commit, 0, size
    with ExitStack() as stack:
        additions = [CommitOperationAdd(name, _Counted(io.BytesIO(data))) for name, data in differing.items()]
        reader = None
        if not same_weights:
            reader = stack.enter_context(
                _Counted(io.FileIO(stack.enter_context(store.open_weights(manifest)), closefd=False))
            )
            additions.append(CommitOperationAdd(WEIGHTS_FILE, reader))
            _check_undamaged(store, additions[-1], weights)
            reader.count = 0  # until here it was only hashed
        api = stack.enter_context(_client(remote))
        title = f"loraforge push {goal.tag or ''}".strip()
        info = api.create_commit(
            remote.address.repo, additions, commit_message=title, revision=goal.branch, parent_commit=head.commit
        )
        commit = info.oid
    sent = small + (min(reader.count, weights.size) if reader is not None else 0)
    _compare(remote, remote.snapshot(commit), store, weights, wanted)
    return commit, sent, size - sent


def _check_undamaged(store: Store, addition: CommitOperationAdd, weights: File) -> None:
    if addition.upload_info.sha256 != weights.digest.raw:
        raise StoreError(f"{store.path}: the bytes stored as {weights.digest} are damaged; nothing was sent")


def _compare(remote: HubRemote, after: Snapshot, store: Store, weights: File, wanted: Mapping[str, bytes]) -> None:
    """Every file is on the hub as it was meant to be, by the hub's own hashes."""
    wrong = [name for name, data in wanted.items() if not _is(after.files.get(name), data)]
    if not _are(after.files.get(WEIGHTS_FILE), store, weights):
        wrong.append(WEIGHTS_FILE)
    if wrong:
        raise RemoteError(f"{remote.address.at(after.commit)}: {', '.join(wrong)} did not arrive as sent; push again")


def _tag(remote: HubRemote, tag: str, commit: str) -> None:
    tags, _ = remote.refs()
    if tags.get(tag) == commit:
        return
    with _client(remote) as api:
        if tag in tags:
            api.delete_tag(remote.address.repo, tag=tag)
        api.create_tag(remote.address.repo, tag=tag, revision=commit)


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
