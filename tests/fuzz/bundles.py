"""Bundles, changed in their index, a manifest or a file, with digests, sizes and offsets made right behind it."""

import os
import random
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgpack

from loraforge_registry.bundle import MAGIC, read_bundle
from loraforge_registry.errors import FormatError
from loraforge_registry.header import header_length, parse_header
from loraforge_registry.ingest import Incoming, examine
from loraforge_registry.manifest import CONFIG_FILE, README_FILE, WEIGHTS_FILE, decode_manifest, encode_manifest
from tests.fuzz.mutators import (
    MANIFEST_KEYS,
    MSGPACK_LEAVES,
    Blindly,
    Mutator,
    Pairs,
    change,
    header,
    read_msgpack,
    write_msgpack,
)
from tests.fuzz.readers import refused

_START = len(MAGIC) + 8
_KEYS = ["schema", "names", "roots", "manifests", "blobs"]
_MEMORY: list[int] = []

Objects = dict[bytes, bytes]


# --- the target -----------------------------------------------------------------------------------------------------


def bundle(data: bytes) -> str:
    try:
        found = read_bundle(Path("b"), _in_memory(data))
    except FormatError as error:
        return refused(error)
    index, objects = split(data)
    assert join(write_msgpack(index), b"".join(objects.values())) == data, "bytes that nothing accounts for"
    for digest, contents in objects.items():
        assert sha256(contents).digest() == digest, "an object under another's digest"
    assert {digest.raw for digest in found.entries} == set(objects)
    for digest, made in found.manifests.items():
        files = {file.path: objects[file.digest.raw] for file in made.files}
        assert decode_manifest(true_manifest(files)).content_id == made.content_id
        assert objects[digest.raw] == encode_manifest(made)
    return f"accepted, {len(found.manifests)} artifacts"


def _in_memory(data: bytes) -> int:
    """A file that is on no disk."""
    if not _MEMORY:
        _MEMORY.append(os.memfd_create("bundle"))
    os.ftruncate(_MEMORY[0], 0)
    os.pwrite(_MEMORY[0], data, 0)
    return _MEMORY[0]


def true_manifest(files: dict[str, bytes]) -> bytes:
    """The manifest that these files have.

    Raises:
        FormatError: a gate refuses one.
    """
    weights = files[WEIGHTS_FILE]
    length = header_length(weights[:32], len(weights))
    incoming = Incoming(
        config=files[CONFIG_FILE],
        header=parse_header(weights[8 : 8 + length], len(weights)),
        chunks=[weights],
        readme=files.get(README_FILE),
    )
    return encode_manifest(examine(incoming)[0])


# --- its form -------------------------------------------------------------------------------------------------------


def split(data: bytes) -> tuple[Pairs, Objects]:
    """The index, and the objects by digest, as far as they are there."""
    length = int.from_bytes(data[len(MAGIC) : _START], "little")
    index = read_msgpack(data[_START : _START + length])
    fields = dict(index)
    position, objects = _START + length, {}
    for digest, size in [*fields["manifests"], *fields["blobs"]]:
        objects[digest] = data[position : position + size]
        position += size
    return index, objects


def join(index: bytes, objects: bytes) -> bytes:
    """A bundle with this index."""
    return MAGIC + len(index).to_bytes(8, "little") + index + objects


def assemble(roots: list[bytes], names: list[Any], manifests: Objects, blobs: Objects) -> bytes:
    """A bundle of these objects."""
    index = Pairs([["schema", "loraforge.bundle/1"], ["names", names], ["roots", roots],
                   ["manifests", [[d, len(b)] for d, b in sorted(manifests.items())]],
                   ["blobs", [[d, len(b)] for d, b in sorted(blobs.items())]]])  # fmt: skip
    return join(write_msgpack(index), b"".join(b for part in (manifests, blobs) for _, b in sorted(part.items())))


# --- its mutator ----------------------------------------------------------------------------------------------------


def mutator(config: Mutator) -> Mutator:
    """Change a bundle; ``config`` changes an adapter_config.json."""

    def mutate(data: bytes, generator: random.Random, blindly: Blindly) -> bytes:
        kind = generator.random()
        if kind < 0.1:
            return blindly(data)
        try:
            index, objects = split(data)
            if kind < 0.45:
                changed = change(index, generator, MSGPACK_LEAVES, _KEYS)
                return join(write_msgpack(changed, in_order=kind < 0.43), b"".join(objects.values()))
            return _with_another_artifact(dict(index), objects, generator, blindly, config)
        except (ValueError, TypeError, LookupError, AttributeError, msgpack.UnpackException, RecursionError):
            return blindly(data)

    return mutate


def _with_another_artifact(fields, objects: Objects, generator, blindly: Blindly, config: Mutator) -> bytes:
    manifests = {digest: objects[digest] for digest, _ in fields["manifests"]}
    blobs = {digest: objects[digest] for digest, _ in fields["blobs"]}
    old = generator.choice(sorted(manifests))
    if generator.random() < 0.4:
        new = write_msgpack(change(read_msgpack(manifests[old]), generator, MSGPACK_LEAVES, MANIFEST_KEYS))
    else:
        new = _with_another_file(read_msgpack(manifests[old]), blobs, generator, blindly, config)
    del manifests[old]
    manifests[sha256(new).digest()] = new
    needed = {row["digest"] for data in manifests.values() for row in _files(read_msgpack(data))}
    moved = {old: sha256(new).digest()}
    return assemble(
        sorted({moved.get(root, root) for root in fields["roots"]}),
        [[name, tag, moved.get(digest, digest)] for name, tag, digest in fields["names"]],
        manifests,
        {digest: data for digest, data in blobs.items() if digest in needed or generator.random() < 0.05},
    )


def _with_another_file(manifest: Pairs, blobs: Objects, generator, blindly: Blindly, config: Mutator) -> bytes:
    """Change a file; return the manifest that is then true, or, where a gate refuses the file, one that names it."""
    contents = {row["path"]: blobs[row["digest"]] for row in _files(manifest)}
    path = generator.choice(sorted(contents))
    mutators = {CONFIG_FILE: config, WEIGHTS_FILE: header}
    changed = mutators[path](contents[path], generator, blindly) if path in mutators else blindly(contents[path])
    contents[path] = changed
    blobs[sha256(changed).digest()] = changed
    try:
        return true_manifest(contents)
    except FormatError:
        for row in dict(manifest)["files"]:
            if dict(row)["path"] == path:
                row[:] = [["path", path], ["digest", sha256(changed).digest()], ["size", len(changed)]]
        return write_msgpack(manifest)


def _files(manifest: Pairs) -> list[dict[str, Any]]:
    return [dict(row) for row in dict(manifest)["files"]]
