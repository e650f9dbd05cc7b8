"""``hf://ORG/REPO``: a repository on the Hub, read. What writes to one is in ``hub_push``.

A revision is resolved to a commit once, and everything is then asked for at that commit: a branch that moves meanwhile
changes nothing. Names of files that a hub sends are compared with ours, and never used as paths.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar
from urllib.parse import quote, urlencode, urlsplit

from loraforge_registry.digest import Digest
from loraforge_registry.errors import FormatError, NotFoundError, RemoteError
from loraforge_registry.hub_record import MAX_RECORD, Record, decode_record
from loraforge_registry.hub_tree_record import TreeOnHub, decode_tree_record
from loraforge_registry.manifest import CONFIG_FILE, RECORD_FILE
from loraforge_registry.names import RefName
from loraforge_registry.remotes.address import HubAddress
from loraforge_registry.remotes.http import Client, RefusalError
from loraforge_registry.remotes.hub_answers import Snapshot, read_refs, read_snapshot, rows
from loraforge_registry.remotes.hub_offers import MAIN, check_is_adapter, name_for, offer_folder, offer_root
from loraforge_registry.remotes.offer import Listed, Offer, OfferedTree, Published, RemoteFile
from loraforge_registry.store import Store
from loraforge_registry.strict_json import Json
from loraforge_registry.system import Buffer
from loraforge_registry.trees import TreeRecord

T = TypeVar("T")

MAX_REFS = 100
"""Tags and branches that are looked through for a parent."""

_MISSING = {"RevisionNotFound": "tag, branch or commit", "EntryNotFound": "file"}


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
        return read_refs(self._get(f"/api/models/{self.address.repo}/refs"))

    def offer(self) -> Offer:
        """Offer the adapter at the root of the repository."""
        return self._offer(self._pinned(), "")

    def tree(self) -> OfferedTree | None:
        """Offer the tree that the record at the root describes, where it describes one."""
        snapshot = self._pinned()
        found = None if CONFIG_FILE in snapshot.files else self.tree_record(snapshot)
        if found is None:
            return None
        return OfferedTree(str(self.address.at(snapshot.commit)), name_for(self.address), found.tree)

    def node(self, tree: OfferedTree, path: str) -> Offer:
        """Offer the adapter in the folder of a node."""
        offer = self._offer(self._pinned(), path)
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
        offer = self._offer(snapshot, path)
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
        return read_snapshot(self.address, self._get(path))

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

    def _offer(self, snapshot: Snapshot, path: str) -> Offer:
        if path:
            return offer_folder(self.address, snapshot, path, self.record(snapshot, f"{path}/"))
        check_is_adapter(self.address, snapshot)
        return offer_root(self.address, snapshot, self.record(snapshot))

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
        found = client.json(f"/api/models?{query}")
    except RefusalError as error:
        if error.status == 401 and client.token:
            raise RemoteError(f"{client.host} does not accept the token (hf auth login, or HF_TOKEN)") from None
        raise RemoteError(f"{client.host} answered {error.status}: {error.said}") from None
    return rows(found)[:limit]


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
