"""What may be pushed: any file of a repository, but no pickle, no safetensors that could mislead, no false adapter."""

from collections.abc import Mapping
from dataclasses import replace

from loraforge_registry import config as adapter_config
from loraforge_registry.digest import Digest
from loraforge_registry.errors import FormatError
from loraforge_registry.header import Header, header_length, parse_header
from loraforge_registry.hub_record import decode_record
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


def adapter_of(hub: Hub, files: Mapping[str, CommittedFile], parent: CommitRecord | None) -> Digest | None:
    """Return the artifact that the root of a commit is, stored; None where there is no adapter.

    Raises:
        RefusedError: 400, the config and the tensors do not agree, or it is no LoRA that is modelled.
    """
    if CONFIG_FILE not in files or WEIGHTS_FILE not in files:
        return None
    if parent is not None and _root(files) == _root(parent.files):
        return parent.adapter
    try:
        manifest, _ = examine(_incoming(hub, files), weights=_file(WEIGHTS_FILE, files[WEIGHTS_FILE]))
        return hub.refs.put_record(encode_manifest(_as_stated(hub, files, manifest)))
    except FormatError as error:
        raise bad_request(f"this is no adapter that PEFT would load as it says: {error}") from error


def _as_stated(hub: Hub, files: Mapping[str, CommittedFile], found: Manifest) -> Manifest:
    """What ``loraforge.json`` states, lineage and all, where it is of these very files; else what was found.

    It is not refused where it is of others: people edit what they pushed, with clients that do not know of it.
    """
    file = files.get(RECORD_FILE)
    if file is None or file.size > MAX_STATED:
        return found
    try:
        stated = decode_record(_read(hub, file, 0, file.size)).manifest
    except FormatError:
        return found
    is_of_these = set(stated.files) <= set(found.files)
    same = replace(stated, files=(), derivation=None, report=None) == replace(found, files=())
    return stated if is_of_these and same else found


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
