"""What may be pushed: any file of a repository, but no pickle, no safetensors that could mislead, no false adapter.

What a commit holds, an adapter or a tree, becomes an artifact of the store, as if it had been made on this machine.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from loraforge_registry import config as adapter_config
from loraforge_registry.digest import Digest
from loraforge_registry.errors import FormatError, LoraforgeError
from loraforge_registry.header import Header, header_length, parse_header
from loraforge_registry.hub_record import Record, decode_record
from loraforge_registry.hub_tree_record import decode_tree_record
from loraforge_registry.ingest import MAX_README, Incoming, examine
from loraforge_registry.manifest import (
    CONFIG_FILE,
    README_FILE,
    RECORD_FILE,
    WEIGHTS_FILE,
    File,
    Manifest,
    encode_manifest,
)
from loraforge_registry.repositories import CommitRecord, CommittedFile
from loraforge_registry.server.errors import RefusedError, bad_request
from loraforge_registry.server.hub import Hub
from loraforge_registry.trees import TreeRecord, encode_tree, untruths

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".dill")
MAX_STATED = 4 * 1024 * 1024  # of loraforge.json, which is read into memory whole
_TOLD = (CONFIG_FILE, WEIGHTS_FILE, README_FILE, RECORD_FILE)
LEFT_OUT = ("training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth")
"""Pickles that transformers' Trainer writes beside an adapter: clients are asked to leave them out, and say so."""


def is_left_out(path: str) -> bool:
    """Whether a client is asked to leave a file out of its commit."""
    return path.rpartition("/")[2] in LEFT_OUT


def check_path(path: str) -> None:
    """Refuse a pickle by its name.

    Raises:
        RefusedError: 400, with the way out.
    """
    if path.lower().endswith(PICKLES):
        raise bad_request(
            f"{path[:200]} is a pickle by its name, which can run code when it is opened, and is not kept here: "
            "save tensors as safetensors (safe_serialization=True), or leave the file out (--exclude)"
        )


def check_file(hub: Hub, path: str, file: CommittedFile) -> None:
    """Refuse a safetensors file with a header that misleads.

    Raises:
        RefusedError: 400, with what is wrong.
    """
    if path.endswith(".safetensors"):
        try:
            header(hub, file)
        except FormatError as error:
            raise bad_request(f"{path}: {error}") from error


def artifact_of(hub: Hub, files: Mapping[str, CommittedFile], known: Sequence[CommitRecord] = ()) -> Digest | None:
    """Return what a commit holds, stored: the adapter at its root, or the tree that its folders are; else None.

    Weights are read, unless one of the ``known`` commits is the same adapter, or all the same files.

    Raises:
        RefusedError: 400, the config and the tensors do not agree, or it is no LoRA that is modelled.
    """
    is_adapter = CONFIG_FILE in files and WEIGHTS_FILE in files
    for other in known:
        if other.files == files or (is_adapter and _root(other.files) == _root(files)):
            return other.adapter
    if not is_adapter:
        return _tree_of(hub, files)
    try:
        manifest, _ = examine(_incoming(hub, files), weights=_file(WEIGHTS_FILE, files[WEIGHTS_FILE]))
        return hub.refs.put_record(encode_manifest(_as_stated(hub, files, manifest)))
    except FormatError as error:
        raise bad_request(f"this is no adapter that PEFT would load as it says: {error}") from error


def _as_stated(hub: Hub, files: Mapping[str, CommittedFile], found: Manifest) -> Manifest:
    """What ``loraforge.json`` states, lineage and all, where it is of these very files; else what was found.

    It is not refused where it is of others: people edit what they pushed, with clients that do not know of it.
    """
    stated = _stated(hub, files)
    if stated is None:
        return found
    all_there = replace(found, files=(*found.files, *_own_readme(hub, files, stated)))
    return stated.manifest if _is_of(stated.manifest, all_there) else found


def _own_readme(hub: Hub, files: Mapping[str, CommittedFile], stated: Record) -> list[File]:
    """The README that an adapter came with, stored by itself, where a push put it below its card."""
    own = next((file for file in stated.manifest.files if file.path == README_FILE), None)
    there = files.get(README_FILE)
    if own is None or there is None or there.blob != stated.git.get(README_FILE) or own.size > there.size:
        return []
    data = _read(hub, there, there.size - min(own.size, MAX_README), there.size)
    if Digest.of(data) != own.digest:
        return []
    hub.blobs.put([data])
    return [own]


def _stated(hub: Hub, files: Mapping[str, CommittedFile]) -> Record | None:
    file = files.get(RECORD_FILE)
    if file is None or file.size > MAX_STATED:
        return None
    try:
        return decode_record(_read(hub, file, 0, file.size))
    except FormatError:
        return None


def _is_of(stated: Manifest, found: Manifest) -> bool:
    """Whether what is stated is of the files that were examined."""
    same = replace(stated, files=(), derivation=None, report=None) == replace(found, files=())
    return set(stated.files) <= set(found.files) and same


def _tree_of(hub: Hub, files: Mapping[str, CommittedFile]) -> Digest | None:
    """Return the tree that the record at the root names, stored with its nodes; None where a folder is not its node.

    That is not refused: the tree's page says what is false, and the next push may mend it.
    """
    tree = _stated_tree(hub, files.get(RECORD_FILE))
    if tree is None:
        return None
    nodes: dict[Digest, Manifest] = {}
    read: set[Digest] = set()
    for path, digest in tree.nodes.items():
        node = _node_of(
            hub, {name: files[f"{path}/{name}"] for name in _TOLD if f"{path}/{name}" in files}, digest, read
        )
        if node is None:
            return None
        nodes[digest] = node
    if any(untruths(tree, nodes.__getitem__)):
        return None
    for node in nodes.values():
        hub.refs.put_record(encode_manifest(node))
    return hub.refs.put_record(encode_tree(tree))


def _stated_tree(hub: Hub, file: CommittedFile | None) -> TreeRecord | None:
    if file is None or file.size > MAX_STATED:
        return None
    try:
        found = decode_tree_record(_read(hub, file, 0, file.size))
    except FormatError:
        return None
    return None if found is None else found.tree


def _node_of(hub: Hub, folder: Mapping[str, CommittedFile], digest: Digest, read: set[Digest]) -> Manifest | None:
    """Return the manifest of a folder that is a certain artifact. Weights are read once, under whatever config."""
    stated = _stated(hub, folder)
    if stated is None or stated.digest != digest or not _has_all(folder, stated.manifest):
        return None
    with suppress(LoraforgeError):
        hub.refs.record(digest)  # which was held against its files when it came
        return stated.manifest
    weights = folder.get(WEIGHTS_FILE)
    if weights is None or CONFIG_FILE not in folder or weights.digest in read:
        return None
    read.add(weights.digest)
    try:
        found, _ = examine(_incoming(hub, folder), weights=_file(WEIGHTS_FILE, weights))
    except (FormatError, RefusedError):
        return None
    return stated.manifest if _is_of(stated.manifest, found) else None


def _has_all(folder: Mapping[str, CommittedFile], manifest: Manifest) -> bool:
    there = {path: (file.digest, file.size) for path, file in folder.items()}
    return all(there.get(file.path) == (file.digest, file.size) for file in manifest.files)


def _incoming(hub: Hub, files: Mapping[str, CommittedFile]) -> Incoming:
    weights = files[WEIGHTS_FILE]
    readme = files.get(README_FILE)
    return Incoming(
        config=_small(hub, CONFIG_FILE, files[CONFIG_FILE], adapter_config.MAX_BYTES),
        header=header(hub, weights),
        chunks=hub.blobs.read(weights.digest, 0, weights.size),
        readme=None if readme is None else _small(hub, README_FILE, readme, MAX_README),
    )


def header(hub: Hub, file: CommittedFile) -> Header:
    """Read and check the header of a safetensors file.

    Raises:
        FormatError: it misleads.
    """
    start = _read(hub, file, 0, min(32, file.size))
    length = header_length(start, file.size)
    raw = _read(hub, file, 8, 8 + length)
    return parse_header(raw, file.size)


def _small(hub: Hub, path: str, file: CommittedFile, limit: int) -> bytes:
    if file.size > limit:
        raise RefusedError(413, f"{path} has {file.size} bytes; the limit is {limit}", "TooLarge")
    return _read(hub, file, 0, file.size)


def _read(hub: Hub, file: CommittedFile, begin: int, end: int) -> bytes:
    return b"".join(bytes(piece) for piece in hub.blobs.read(file.digest, begin, end))


def _root(files: Mapping[str, CommittedFile]) -> list[Digest | None]:
    return [files[path].digest if path in files else None for path in _TOLD]


def _file(path: str, file: CommittedFile) -> File:
    return File(path, file.digest, file.size)
