"""The bytes of the format, written out: a change here is a change of the format (registry/SPEC.md)."""

import json
from pathlib import Path

import pytest

from loraforge_registry import canonical, refs
from loraforge_registry.config import parse_config
from loraforge_registry.digest import Digest
from loraforge_registry.errors import ManifestError
from loraforge_registry.header import TensorEntry
from loraforge_registry.layout import content_id, read_layout
from loraforge_registry.manifest import (
    Artifact,
    Derivation,
    File,
    Input,
    Manifest,
    Tensor,
    decode_manifest,
    encode_manifest,
)
from loraforge_registry.new_store import FORMAT

VECTORS = json.loads((Path(__file__).parents[2] / "vectors" / "registry" / "format-1.json").read_text())


def digest(algorithm, byte):
    return Digest(algorithm, f"{byte:02x}" * 32)


def manifest():
    inputs = (
        Input(Artifact(digest("sha256", 1), digest("sha256", 2)), 0.7),
        Input(digest("sha256", 3), -0.5),
        Input(Derivation("linear", 1, (), {"base": "b"}), 1.0),
    )
    return Manifest(
        content_id=digest("sha256", 4),
        files=(
            File("adapter_config.json", digest("sha256", 5), 300),
            File("adapter_model.safetensors", digest("sha256", 6), 70000),
        ),
        tensors=(Tensor(TensorEntry("t.lora_A.weight", "F32", (2, 6), 0, 48), digest("blake3", 7)),),
        base_name="some/base",
        base_revision=None,
        derivation=Derivation("rerank", 1, inputs, {"rank": 16}),
        report={"error": 0.25, "targets": {"t": {"error": 0.25, "rank": 16}}},
    )


def test_format():
    assert VECTORS["format"].encode() == FORMAT


def test_manifest():
    data = bytes.fromhex(VECTORS["manifest"])
    assert encode_manifest(manifest()) == data
    assert decode_manifest(data) == manifest()
    assert str(Digest.of(data)) == VECTORS["artifact_digest"]


@pytest.mark.parametrize("row", VECTORS["canonical"], ids=lambda row: row["hex"])
def test_canonical(row):
    assert canonical.encode(row["value"]).hex() == row["hex"]
    assert canonical.decode(bytes.fromhex(row["hex"])) == row["value"]


@pytest.mark.parametrize("row", VECTORS["not_canonical"], ids=lambda row: row["why"])
def test_not_canonical(row):
    with pytest.raises(ManifestError):
        canonical.decode(bytes.fromhex(row["hex"]))


def test_content_id():
    config = parse_config(json.dumps(VECTORS["content"]["config"]).encode())
    tensors = [
        (TensorEntry(name, dtype, tuple(shape), 0, 0), Digest.parse(blake3))
        for name, dtype, shape, blake3 in VECTORS["content"]["tensors"]
    ]
    layout = read_layout(config, [entry for entry, _ in tensors])
    assert str(content_id(layout, tensors)) == VECTORS["content"]["content_id"]


def test_reflog_record():
    move = refs.Move(1700000000, None, digest("sha256", 8), "v1", "a b", "push")
    assert refs._record(move).decode() == VECTORS["reflog_record"]
    assert refs._parse_record(VECTORS["reflog_record"].encode().rstrip(b"\n")) == move
