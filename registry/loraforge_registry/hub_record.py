"""``loraforge.json``: an artifact's manifest as JSON, at the root of a repository on the Hub.

It is the manifest without loss: from it alone the canonical bytes are made again, and their digest must be the one
that it states. So what it says of tensors and lineage is either exactly what was pushed, or refused.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

from loraforge_registry import canonical, strict_json
from loraforge_registry.canonical import Value
from loraforge_registry.digest import Digest
from loraforge_registry.errors import FormatError
from loraforge_registry.manifest import RECORD_FILE, SCHEMA, Manifest, decode_manifest, derivation_as_json
from loraforge_registry.strict_json import Json

RECORD_SCHEMA = "loraforge.hub/1"
MAX_RECORD = 16 * 1024 * 1024
_KEYS = {
    "schema", "manifest", "digest", "content_id", "base", "derivation", "parents", "files", "git", "report", "tensors"
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Record:
    """An artifact, and the git ids that the repository's config and README had when it was pushed."""

    digest: Digest
    manifest: Manifest
    git: Mapping[str, str] = field(default_factory=dict)


def encode_record(record: Record) -> bytes:
    """Return the bytes of ``loraforge.json``; equal records give equal bytes."""
    manifest = record.manifest
    derivation = manifest.derivation
    fields: dict[str, object] = {
        "schema": RECORD_SCHEMA,
        "manifest": SCHEMA,
        "digest": str(record.digest),
        "content_id": str(manifest.content_id),
        "base": {"name": manifest.base_name, "revision": manifest.base_revision},
        "derivation": None if derivation is None else derivation_as_json(derivation),
        "parents": [str(parent) for parent in derivation.artifacts()] if derivation else [],
        "files": {file.path: {"digest": str(file.digest), "size": file.size} for file in manifest.files},
        "git": dict(record.git),
        "report": None if manifest.report is None else dict(manifest.report),
        "tensors": {
            tensor.entry.name: {
                "dtype": tensor.entry.dtype,
                "shape": list(tensor.entry.shape),
                "data_offsets": [tensor.entry.begin, tensor.entry.end],
                "digest": str(tensor.digest),
            }
            for tensor in manifest.tensors
        },
    }
    rows = [f"{json.dumps(key)}: {json.dumps(value, sort_keys=True)}" for key, value in fields.items()]
    return ("{\n" + ",\n".join(rows) + "\n}\n").encode()


def decode_record(data: bytes) -> Record:
    """Read ``loraforge.json``; ``decode_record(encode_record(r)) == r``.

    Raises:
        FormatError: it is none, or does not describe the artifact that it names.
    """
    try:
        fields = fields_of(strict_json.loads(data, max_bytes=MAX_RECORD, max_depth=48))
        if fields.get("schema") != RECORD_SCHEMA:
            raise FormatError(f"its schema is {str(fields.get('schema'))[:40]!r}, expected {RECORD_SCHEMA!r}")
        if set(fields) != _KEYS:
            raise FormatError(f"its keys are not those of a {RECORD_SCHEMA}")
        encoded = canonical.encode(_manifest(fields))
        digest = digest_of(fields["digest"])
        if Digest.of(encoded) != digest:
            raise FormatError(f"it names the artifact {digest}, and describes {Digest.of(encoded)}")
        manifest = decode_manifest(encoded)
        git = {path: text_of(value) for path, value in fields_of(fields["git"]).items()}
    except ValueError as error:
        raise FormatError(f"{RECORD_FILE}: {error}") from error
    return Record(digest, manifest, git)


def _manifest(fields: Mapping[str, Json]) -> Value:
    """The manifest as it is encoded: digests are raw bytes there."""
    files = [
        {"path": path, "digest": digest_of(row["digest"]).raw, "size": _plain(row["size"])}
        for path, row in ((path, fields_of(row, {"digest", "size"})) for path, row in _rows(fields["files"]))
    ]
    tensors: list[Value] = []
    for name, row in _rows(fields["tensors"]):
        found = fields_of(row, {"dtype", "shape", "data_offsets", "digest"})
        begin, end = _list(found["data_offsets"], 2)
        digest = digest_of(found["digest"], "blake3").raw
        tensors.append([name, _plain(found["dtype"]), _plain(found["shape"]), _plain(begin), _plain(end), digest])
    derivation = fields["derivation"]
    return {
        "schema": _plain(fields["manifest"]),
        "base": _plain(fields["base"]),
        "content_id": digest_of(fields["content_id"]).raw,
        "derivation": None if derivation is None else _derivation(derivation),
        "files": cast("list[Value]", files),
        "report": _plain(fields["report"]),
        "tensors": tensors,
    }


def _derivation(value: Json) -> Value:
    fields = fields_of(value, {"operation", "version", "parameters", "inputs"})
    return {
        "operation": _plain(fields["operation"]),
        "version": _plain(fields["version"]),
        "parameters": _plain(fields["parameters"]),
        "inputs": [_input(item) for item in _list(fields["inputs"])],
    }


def _input(value: Json) -> Value:
    fields = fields_of(value)
    weight = _plain(fields.get("weight"))
    if set(fields) == {"weight", "digest", "content_id"}:
        both: Value = {key: digest_of(fields[key]).raw for key in ("digest", "content_id")}
        return {"weight": weight, "artifact": both}
    if set(fields) == {"weight", "content_id"}:
        return {"weight": weight, "content_id": digest_of(fields["content_id"]).raw}
    if set(fields) == {"weight", "derivation"}:
        return {"weight": weight, "derivation": _derivation(fields["derivation"])}
    raise FormatError("an input of its derivation has other fields than a weight and one source")


def _rows(value: Json) -> list[tuple[str, Json]]:
    return sorted(fields_of(value).items(), key=lambda row: row[0].encode())


def fields_of(value: Json, keys: set[str] | None = None) -> dict[str, Json]:
    """Return a map, of exactly these keys where they are given; anything else raises FormatError."""
    if not isinstance(value, dict) or (keys is not None and set(value) != keys):
        raise FormatError(f"{json.dumps(value)[:60]} where an object of {', '.join(sorted(keys or ()))} was expected")
    return value


def _list(value: Json, length: int | None = None) -> list[Json]:
    if not isinstance(value, list) or length not in (None, len(value)):
        raise FormatError(f"{json.dumps(value)[:60]} where a list was expected")
    return value


def text_of(value: Json) -> str:
    """Return a text; anything else raises FormatError."""
    if not isinstance(value, str):
        raise FormatError(f"{json.dumps(value)[:60]} where a text was expected")
    return value


def digest_of(value: Json, algorithm: str = "sha256") -> Digest:
    """Return a digest by this algorithm; anything else raises FormatError."""
    digest = Digest.parse(text_of(value))
    if digest.algorithm != algorithm:
        raise FormatError(f"{digest}: expected a digest by {algorithm}")
    return digest


def _plain(value: Json) -> Value:
    """A value that JSON and msgpack spell alike; the manifest's own reader checks its type."""
    return cast("Value", value)
