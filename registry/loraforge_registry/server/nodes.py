"""The nodes of a tree, as far as a page tells of them: each held against what the tree says of it, within limits.

A node of a tree in this store is an artifact. In a commit it is a folder: its record must have the digest that the tree
names, its files the digests that the record states, its weights the tensors. Whatever is not so is a sentence.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from loraforge_registry.digest import Digest
from loraforge_registry.errors import FormatError, LoraforgeError
from loraforge_registry.facts import Facts, facts_of
from loraforge_registry.hub_record import Record, decode_record
from loraforge_registry.manifest import FILES, RECORD_FILE, WEIGHTS_FILE, Manifest, encode_manifest
from loraforge_registry.repositories import CommitRecord, CommittedFile
from loraforge_registry.server import gate, repos
from loraforge_registry.server.forest import Tree
from loraforge_registry.server.hub import Hub
from loraforge_registry.server.recent import Recent
from loraforge_registry.trees import parent_path

MAX_READ = 150  # nodes of a tree that a page reads
MAX_BYTES = 16 * 1024 * 1024  # of their records: about a second of reading, once

_KNOWN = Recent[tuple[object, ...], Facts | str](20_000)


@dataclass(frozen=True, slots=True)
class Node:
    """What is said of a node: facts, or why there are none. Without either it was not read."""

    path: str
    digest: Digest
    facts: Facts | None = None
    problem: str = ""

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self.path.rpartition("/")[2]


def read_nodes(hub: Hub, commit: CommitRecord, tree: Tree, paths: Iterable[str]) -> Iterator[Node]:
    """Yield nodes; the first few of them are read."""
    read, size = 0, 0
    for path in paths:
        record = None if tree.is_here else commit.files.get(f"{path}/{RECORD_FILE}")
        read, size = read + 1, size + (0 if record is None else record.size)
        if read > MAX_READ or size > MAX_BYTES:
            yield Node(path, tree.record.nodes[path])
        else:
            yield read_node(hub, commit, tree, path)


def read_node(hub: Hub, commit: CommitRecord, tree: Tree, path: str) -> Node:
    """Read one."""
    digest = tree.record.nodes[path]
    found = repos.facts_of(hub, digest) if tree.is_here else _folder(hub, commit, tree, path)
    if found is None:
        found = "it is not in the store, or it is damaged"
    if isinstance(found, str):
        return Node(path, digest, problem=found)
    above = parent_path(path)
    expected = None if above is None else tree.record.nodes[above]
    if found.parent != expected:
        return Node(
            path, digest, found, f"it was made atop {_spell(found.parent)}, its place is atop {_spell(expected)}"
        )
    return Node(path, digest, found)


def manifest_of(hub: Hub, commit: CommitRecord, tree: Tree, path: str) -> Manifest | None:
    """Return the manifest of a node that was read without a problem; None where it went meanwhile."""
    try:
        if not tree.is_here:
            return _record(hub, commit.files[f"{path}/{RECORD_FILE}"]).manifest
        found = hub.refs.record(tree.record.nodes[path])
    except (KeyError, LoraforgeError, OSError):
        return None
    return found if isinstance(found, Manifest) else None


def _folder(hub: Hub, commit: CommitRecord, tree: Tree, path: str) -> Facts | str:
    """The facts that a folder states of its adapter, or what of them is false; the same files give the same answer."""
    files = {name: commit.files.get(f"{path}/{name}") for name in (RECORD_FILE, *FILES)}
    expected = tree.record.nodes[path]
    key = (expected, *(None if file is None else file.digest for file in files.values()))
    known = _KNOWN.get(key)
    if known is None:
        try:
            known = _checked(hub, files, expected)
        except FormatError as error:
            known = str(error)
        except (LoraforgeError, OSError):
            return "it cannot be read"
        _KNOWN.put(key, known, 1)
    return known


def _checked(hub: Hub, files: dict[str, CommittedFile | None], expected: Digest) -> Facts | str:
    stated = files[RECORD_FILE]
    if stated is None:
        return f"its folder has no {RECORD_FILE}"
    record = _record(hub, stated)
    if record.digest != expected:
        return f"its folder holds {_spell(record.digest)}, the tree's node is {_spell(expected)}"
    weights = None
    for file in record.manifest.files:
        there = files.get(file.path)
        if there is None or (there.digest, there.size) != (file.digest, file.size):
            return f"{file.path[:60]} is not the file that its record states"
        weights = there if file.path == WEIGHTS_FILE else weights
    if weights is None:
        return f"its record states no {WEIGHTS_FILE}"
    if set(gate.header(hub, weights).tensors) != {tensor.entry for tensor in record.manifest.tensors}:
        return f"its record states other tensors than {WEIGHTS_FILE} has"
    found = facts_of(encode_manifest(record.manifest))
    return "its record is that of something else" if found is None else found


def _record(hub: Hub, file: CommittedFile) -> Record:
    if file.size > gate.MAX_STATED:
        raise FormatError(f"{RECORD_FILE} has {file.size:,} bytes; what is read of it here is {gate.MAX_STATED:,}")
    return decode_record(b"".join(bytes(piece) for piece in hub.blobs.read(file.digest, 0, file.size)))


def _spell(digest: Digest | None) -> str:
    return "the base" if digest is None else f"sha256:{digest.short}"
