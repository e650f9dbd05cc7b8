"""Where a trained adapter came from: base and data by content, configuration, versions."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path

import torch
from blake3 import blake3

from loraforge.adapter import Adapter, identity
from loraforge.checkpoint.reader import open_checkpoint
from loraforge.checkpoint.receipt import checkpoint_digest
from loraforge.training.config import TrainConfig
from loraforge_registry.canonical import Value
from loraforge_registry.digest import Digest
from loraforge_registry.manifest import Derivation, Input
from loraforge_registry.paths import AnyPath

VERSION = 1
_CHUNK = 1 << 24
_ELSEWHERE = frozenset({"device", "keep", "save_every", "shard"})
"""Settings that do not say what was computed."""


def trained(
    config: TrainConfig, facts: Mapping[str, Value], start: Adapter | None = None, *, version: str
) -> Derivation:
    """Return how an adapter was made: settings that are not the default, ``facts`` (base, data), versions.

    ``start`` is the adapter it was trained on from, or atop of, if any.
    """
    settings = {
        field.name: _scalar(getattr(config, field.name))
        for field in fields(config)
        if field.name not in _ELSEWHERE and getattr(config, field.name) not in (field.default, {}, ())
    }
    versions: dict[str, Value] = {"loraforge": version, "torch": str(torch.__version__)}
    inputs = () if start is None else (Input(identity(start)),)
    return Derivation("train", VERSION, inputs, {**settings, **versions, **facts})


def base_digest(base: AnyPath) -> Digest:
    """Return the digest of a base checkpoint's tensors, the same that a merge's receipt has.

    Cost: reads the checkpoint once (BLAKE3).
    """
    buffer = memoryview(bytearray(_CHUNK))
    with open_checkpoint(base) as checkpoint:
        found = []
        for tensor in checkpoint.tensors.values():
            hasher = blake3()
            for offset in range(0, tensor.nbytes, _CHUNK):
                part = buffer[: min(_CHUNK, tensor.nbytes - offset)]
                checkpoint.read_into(tensor, offset, part)
                hasher.update(part)
            found.append((tensor.entry, Digest.from_raw("blake3", hasher.digest())))
        checkpoint.check_unchanged()
    return checkpoint_digest(found)


def data_digest(files: Iterable[Path]) -> Digest:
    """Return the sha256 of files one after another."""
    sha256 = hashlib.sha256()
    for file in files:
        sha256.update(file.read_bytes())
    return Digest.from_raw("sha256", sha256.digest())


def _scalar(value: object) -> Value:
    """A manifest's parameters are numbers and texts."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (tuple, list)) and all(isinstance(item, str) for item in value):
        return ", ".join(value)
    return json.dumps(value, sort_keys=True, default=list)
