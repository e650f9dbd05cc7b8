"""``hf://ORG/REPO``: a repository on the Hub, read. What writes to one is in ``hub_push``.

A revision is resolved to a commit once, and everything is then asked for at that commit: a branch that moves meanwhile
changes nothing. Names of files that a hub sends are compared with ours, and never used as paths.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import quote, urlencode, urlsplit

from loraforge_registry.digest import Digest
from loraforge_registry.errors import FormatError, NotFoundError, ReferenceSyntaxError, RemoteError
from loraforge_registry.hub_record import MAX_RECORD, Record, decode_record
from loraforge_registry.hub_tree_record import TreeOnHub, decode_tree_record
from loraforge_registry.manifest import CONFIG_FILE, FILES, README_FILE, RECORD_FILE, WEIGHTS_FILE, File
from loraforge_registry.names import DEFAULT_TAG, RefName
from loraforge_registry.remotes.address import HubAddress
from loraforge_registry.remotes.http import Client, RefusalError
from loraforge_registry.remotes.offer import Listed, Offer, OfferedTree, Published, RemoteFile
from loraforge_registry.store import Store
from loraforge_registry.strict_json import Json
from loraforge_registry.system import Buffer
from loraforge_registry.trees import TreeRecord

T = TypeVar("T")

MAIN = "main"
MAX_FILES = 10_000
MAX_REFS = 100
"""Tags and branches that are looked through for a parent."""

_COMMIT = re.compile(r"[0-9a-f]{40}")
_MISSING = {"RevisionNotFound": "tag, branch or commit", "EntryNotFound": "file"}


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a repository, as the hub describes it: ``sha256`` where it lies in LFS, else git's id."""

    size: int
    sha256: Digest | None
    git_id: str | None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A repository at one commit."""

    commit: str
    files: Mapping[str, HubFile]


class HubRemote:
    """A repository, as a remote."""

    def __init__(self, client: Client, address: HubAddress, *, private: bool = False) -> None:
        self.client = client
        self.address = address
        self.private = private
        self._now: Snapshot | None = None
        self._versions: Mapping[Digest, tuple[Snapshot, str]] | None = None

    def list(self) -> Sequence[Listed]:
        """Return the repository's tags, then its branches, with their commits."""
        tags, branches = self.refs()
        return [Listed(name, commit) for name, commit in (*tags.items(), *branches.items())]

    def refs(self) -> tuple[Mapping[str, str], Mapping[str, str]]:
        """Return the commits of the repository's tags, and of its branches."""
        refs = _mapping(self._get(f"/api/models/{self.address.repo}/refs"))
        tags, branches = (
            {_text(row, "name"): _commit(row, "targetCommit") for row in _rows(refs.get(kind))}
            for kind in ("tags", "branches")
        )
        return tags, branches

    def offer(self) -> Offer:
        """Offer the adapter at the root of the repository."""
        return self._offer(self._pinned())

    def tree(self) -> OfferedTree | None:
        """Offer the tree that the record at the root describes, where it describes one."""
        snapshot = self._pinned()
        found = None if CONFIG_FILE in snapshot.files else self.tree_record(snapshot)
        return None if found is None else OfferedTree(str(self.address.at(snapshot.commit)), self._name(), found.tree)

    def node(self, tree: OfferedTree, path: str) -> Offer:
        """Offer the adapter in the folder of a node."""
        offer = self._node(self._pinned(), path)
        if offer.artifact != tree.record.nodes[path]:
            raise FormatError(
                f"{offer.where} holds the adapter {offer.artifact}, the tree's node there is {tree.record.nodes[path]}"
            )
        return offer

    def find(self, digest: Digest) -> Offer | None:
        """Look for an artifact among the repository's tags and branches: earlier versions are often parents."""
        if self._versions is None:
            commits = dict.fromkeys(listed.target for listed in self.list()[:MAX_REFS])
            found = (self._artifacts(snapshot) for snapshot in map(self.snapshot, commits))
            self._versions = {artifact: place for places in found for artifact, place in places.items()}
        if digest not in self._versions:
            return None
        snapshot, path = self._versions[digest]
        offer = self._node(snapshot, path) if path else self._offer(snapshot)
        return offer if offer.artifact == digest else None

    def _artifacts(self, snapshot: Snapshot) -> dict[Digest, tuple[Snapshot, str]]:
        """The artifacts that a commit says it holds, and the folder of each."""
        if CONFIG_FILE in snapshot.files:
            record = self.record(snapshot)
            return {} if record is None else {record.digest: (snapshot, "")}
        found = self.tree_record(snapshot)
        return {} if found is None else {digest: (snapshot, path) for path, digest in found.tree.nodes.items()}

    def fetch(self, offer: Offer, file: RemoteFile) -> Iterator[Buffer]:
        """Yield a file's bytes; git's id, where it is what we know, is checked behind the last."""
        commit, path = offer.where.rpartition("@")[2][:40], offer.folder + file.path
        sha1 = hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
        with self.answers(f"{path} at {self.address.repo}"):
            for chunk in self.client.body(self._path(commit, path), file.size):
                if file.git_id is not None:
                    sha1.update(chunk)
                yield chunk
        if file.git_id is not None and sha1.hexdigest() != file.git_id:
            raise RemoteError(
                f"{offer.where}: {file.path}: expected the git id {file.git_id}, the bytes that came have "
                f"{sha1.hexdigest()}; nothing was stored"
            )

    def publish(self, store: Store, digest: Digest, name: RefName | None, *, force: bool) -> Published:
        """Put an artifact or a tree into the repository, as one commit."""
        if isinstance(store.record(digest), TreeRecord):
            from loraforge_registry.remotes.hub_trees import publish_tree  # noqa: PLC0415 - as below

            return publish_tree(self, store, digest, name, force=force)
        from loraforge_registry.remotes.hub_push import publish  # noqa: PLC0415 - the hub's client takes its time

        return publish(self, store, digest, name, force=force)

    def snapshot(self, revision: str) -> Snapshot:
        """Resolve a revision to its commit, with the files there.

        Raises:
            NotFoundError: there is no such repository or revision.
        """
        path = f"/api/models/{self.address.repo}/revision/{quote(revision, safe='')}?blobs=true"
        fields = _mapping(self._get(path))
        rows = _rows(fields.get("siblings"))
        if len(rows) > MAX_FILES:
            raise RemoteError(f"{self.address}: {len(rows)} files; the limit is {MAX_FILES}")
        files: dict[str, HubFile] = {}
        for row in rows:
            name = _text(row, "rfilename")
            if name in files:
                raise RemoteError(f"{self.address}: {name[:80]!r} stands twice among its files")
            files[name] = _hub_file(row)
        return Snapshot(_commit(fields, "sha"), files)

    def record(self, snapshot: Snapshot, folder: str = "") -> Record | None:
        """Read the ``loraforge.json`` of an adapter at a commit, where there is one.

        Raises:
            FormatError: it is damaged.
        """
        return self._decoded(snapshot, folder + RECORD_FILE, decode_record)

    def tree_record(self, snapshot: Snapshot) -> TreeOnHub | None:
        """Read the ``loraforge.json`` of a tree at a commit, where there is one.

        Raises:
            FormatError: it is damaged.
        """
        return self._decoded(snapshot, RECORD_FILE, decode_tree_record)

    def _decoded(self, snapshot: Snapshot, path: str, decode: Callable[[bytes], T]) -> T | None:
        file = snapshot.files.get(path)
        if file is None:
            return None
        if file.size > MAX_RECORD:
            raise FormatError(f"{self.address}: {path} has {file.size} bytes; the limit is {MAX_RECORD}")
        try:
            return decode(self.small(snapshot, path, MAX_RECORD))
        except FormatError as error:
            where = self.address.at(snapshot.commit)
            raise FormatError(f"{where}{'/' * ('/' in path)}{path.rpartition('/')[0]}: {error}") from error

    def small(self, snapshot: Snapshot, name: str, limit: int) -> bytes:
        """Read a small file at a commit."""
        with self.answers(f"{name} at {self.address}"):
            return self.client.small(self._path(snapshot.commit, name), limit)

    @contextmanager
    def answers(self, what: str) -> Iterator[None]:
        """Turn a hub's refusal into a sentence."""
        try:
            yield
        except RefusalError as error:
            raise refused(self, what, error.status, error.code, error.said) from None

    def _get(self, path: str) -> Json:
        with self.answers(str(self.address)):
            return self.client.json(path)

    def _path(self, commit: str, name: str) -> str:
        return f"/{self.address.repo}/resolve/{commit}/{quote(name)}"

    def _pinned(self) -> Snapshot:
        """The commit that the address means, looked up once."""
        if self._now is None:
            self._now = self.snapshot(self.address.revision or MAIN)
        return self._now

    def _node(self, snapshot: Snapshot, path: str) -> Offer:
        """Offer the adapter in a folder, which must be the one that the record beside it describes."""
        folder, where = f"{path}/", f"{self.address.at(snapshot.commit)}/{path}"
        record = self.record(snapshot, folder)
        if record is None:
            raise FormatError(f"{where}: no {RECORD_FILE}, so it is no node of a tree")
        manifest = record.manifest
        changed = [file.path for file in manifest.files if not _is_as_recorded(snapshot, folder, file, record)]
        if changed:
            raise FormatError(
                f"{where}: {', '.join(changed)} changed, or went, since the tree was pushed; pull an earlier commit "
                f"({self.address.repo}@COMMIT), or push the tree again"
            )
        return Offer(
            where=where,
            name=None,
            files=tuple(
                RemoteFile(file.path, file.size, file.digest, _remote_id(snapshot.files[folder + file.path]))
                for file in manifest.files
            ),
            artifact=record.digest,
            derivation=manifest.derivation,
            report=manifest.report,
            folder=folder,
        )

    def _offer(self, snapshot: Snapshot) -> Offer:
        where = self.address.at(snapshot.commit)
        self._check_is_adapter(snapshot)
        record = self.record(snapshot)
        notes: list[str] = []
        if record is not None and not describes(record, snapshot):
            notes.append(
                f"{where}: {RECORD_FILE} is about other files than are there now, so its lineage does not count"
            )
            record = None
        files = {name: _remote_file(name, file) for name, file in snapshot.files.items() if name in FILES}
        if record is None:
            return Offer(str(where), self._name(), tuple(files.values()), notes=tuple(notes))
        known = {file.path: file for file in record.manifest.files}
        for path in (CONFIG_FILE, WEIGHTS_FILE):
            files[path] = RemoteFile(path, files[path].size, known[path].digest, files[path].git_id)
        edited = self._take_readme(files, record)
        if edited:
            notes.append(f"{where}: {README_FILE} was edited since it was pushed, so the digest is another than it was")
        return Offer(
            where=str(where),
            name=self._name(),
            files=tuple(files.values()),
            artifact=None if edited else record.digest,
            derivation=record.manifest.derivation,
            report=record.manifest.report,
            notes=tuple(notes),
        )

    def _take_readme(self, files: dict[str, RemoteFile], record: Record) -> bool:
        """Leave in ``files`` the README that belongs to the adapter; say whether somebody edited it on the hub."""
        there = files.pop(README_FILE, None)
        ours = next((file for file in record.manifest.files if file.path == README_FILE), None)
        if ours is None:
            return False  # what is there is a card that was written for the hub
        if there is not None and there.git_id == record.git.get(README_FILE) and there.size >= ours.size:
            skip = there.size - ours.size
            files[README_FILE] = RemoteFile(README_FILE, there.size, ours.digest, there.git_id, skip)
            return False
        if there is not None:
            files[README_FILE] = there
        return True

    def _check_is_adapter(self, snapshot: Snapshot) -> None:
        """Say what is wrong with a repository that holds no adapter."""
        names = snapshot.files
        twins = [name for name in names if name.lower() in FILES and name not in FILES and name.lower() != "readme.md"]
        if twins:
            raise FormatError(f"{self.address}: {twins[0]!r} must be called {twins[0].lower()}")
        if WEIGHTS_FILE not in names and "adapter_model.bin" in names:
            raise FormatError(
                f"{self.address} has only adapter_model.bin, a pickle, which can run code and is never opened here; "
                "ask its author for safetensors, or, if you trust them, save it with PEFT's "
                "save_pretrained(DIR, safe_serialization=True) and push DIR"
            )
        missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if name not in names]
        if missing:
            deeper = sorted(name.rpartition("/")[0] for name in names if name.endswith(f"/{WEIGHTS_FILE}"))
            hint = f" (there is one in {deeper[0][:80]}/, which must be pushed on its own)" if deeper else ""
            whole = " (it has config.json: it is a whole model)" if "config.json" in names and not deeper else ""
            raise FormatError(f"{self.address}: no {missing[0]} at its root, so it is no PEFT adapter{hint or whole}")

    def _name(self) -> RefName | None:
        """What to call it here, from the repository's name and the revision."""
        name = re.sub(r"[^a-z0-9._-]+", "-", self.address.repo.partition("/")[2].lower())
        tag = self.address.revision or DEFAULT_TAG
        tag = DEFAULT_TAG if tag == MAIN or _COMMIT.fullmatch(tag) else tag
        try:
            return RefName(name, tag)
        except ReferenceSyntaxError:
            return None


def connect() -> Client:
    """The hub that ``HF_ENDPOINT`` names, with the token of ``hf auth login`` or ``HF_TOKEN``.

    Raises:
        RemoteError: the endpoint is no URL, or the user has switched the hub off.
    """
    from huggingface_hub import constants, get_token  # noqa: PLC0415 - a second, and only who needs it pays

    if constants.HF_HUB_OFFLINE:
        raise RemoteError("HF_HUB_OFFLINE is set, so no hub is asked; unset it")
    endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
        raise RemoteError("HF_ENDPOINT must be http://HOST or https://HOST, without a user's name")
    return Client(endpoint, get_token())


def search(client: Client, text: str, limit: int) -> list[dict[str, Json]]:
    """Ask a hub for adapters: its own search, by name, the most used first.

    Raises:
        RemoteError: no answer.
    """
    query = urlencode({"search": text, "filter": "peft", "sort": "downloads", "limit": limit})
    try:
        rows = client.json(f"/api/models?{query}")
    except RefusalError as error:
        if error.status == 401 and client.token:
            raise RemoteError(f"{client.host} does not accept the token (hf auth login, or HF_TOKEN)") from None
        raise RemoteError(f"{client.host} answered {error.status}: {error.said}") from None
    return _rows(rows)[:limit]


def refused(remote: HubRemote, what: str, status: int, code: str, said: str) -> NotFoundError | RemoteError:
    """Say what a refusal means, and what to do."""
    token, host = remote.client.token, remote.client.host
    if code in _MISSING:
        return NotFoundError(f"{what}: there is no such {_MISSING[code]}")
    if code == "GatedRepo":
        return RemoteError(f"{what}: access must be asked for on its page, {host}/{remote.address.repo}")
    if status == 401 and code != "RepoNotFound" and token:
        return RemoteError(f"{what}: {host} does not accept the token (hf auth login, or HF_TOKEN)")
    if status in (401, 404):
        login = "your token may not see it" if token else "it is private: log in with hf auth login, or set HF_TOKEN"
        return NotFoundError(f"{what}: there is no such repository on {host}, or {login}")
    if status == 403:
        return RemoteError(
            f"{what}: not allowed with {'this token' if token else 'no token'}{f' ({said})' * bool(said)}"
        )
    return RemoteError(f"{what}: {host} answered {status}{f' ({said})' * bool(said)}")


def describes(record: Record, snapshot: Snapshot) -> bool:
    """Whether a record is about the config and weights that are there, as far as the hub says."""
    weights, config = snapshot.files[WEIGHTS_FILE], snapshot.files[CONFIG_FILE]
    recorded = record.manifest.file(WEIGHTS_FILE)
    same_weights = weights.size == recorded.size and weights.sha256 in (None, recorded.digest)
    return same_weights and config.git_id == record.git.get(CONFIG_FILE)


def _is_as_recorded(snapshot: Snapshot, folder: str, file: File, record: Record) -> bool:
    """Whether a node's file is the one of its record, as far as the hub says; its bytes are hashed when they come."""
    there = snapshot.files.get(folder + file.path)
    if there is None or there.size != file.size:
        return False
    if there.sha256 is not None:
        return there.sha256 == file.digest
    return file.path == WEIGHTS_FILE or there.git_id == record.git.get(file.path)


def _remote_id(file: HubFile) -> str | None:
    return None if file.sha256 else file.git_id


def _remote_file(path: str, file: HubFile) -> RemoteFile:
    return RemoteFile(path, file.size, file.sha256, _remote_id(file))


def _hub_file(row: Mapping[str, Json]) -> HubFile:
    size, git_id, lfs = row.get("size"), row.get("blobId"), row.get("lfs")
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 2**53:
        raise RemoteError(f"the hub gives {str(size)[:40]} as a size")
    git_id = git_id if isinstance(git_id, str) and _COMMIT.fullmatch(git_id) else None
    digest = None
    if isinstance(lfs, dict):
        try:
            digest = Digest("sha256", _text(lfs, "sha256"))
        except ReferenceSyntaxError as error:
            raise RemoteError(f"the hub gives what is no digest: {error}") from error
    if digest is None and git_id is None:
        raise RemoteError("the hub gives no hash for a file, so that nothing could be checked")
    return HubFile(size, digest, git_id)


def _mapping(value: Json) -> dict[str, Json]:
    if not isinstance(value, dict):
        raise RemoteError("the hub answered something else than was asked for")
    return value


def _rows(value: Json) -> list[dict[str, Json]]:
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise RemoteError("the hub answered something else than a list")
    return [_mapping(row) for row in value]


def _text(row: Mapping[str, Json], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise RemoteError(f"the hub gives {str(value)[:40]!r} as {key}")
    return value


def _commit(row: Mapping[str, Json], key: str) -> str:
    commit = _text(row, key)
    if not _COMMIT.fullmatch(commit):
        raise RemoteError(f"the hub gives {commit[:60]!r} as a commit")
    return commit
