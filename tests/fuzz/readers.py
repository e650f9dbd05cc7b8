"""Readers of strangers' bytes, each judged: by a second opinion where there is one, by a law where there is none.

A judge takes bytes and returns in a few words what became of them. It lets through nothing but the errors that the
reader documents, and asserts what must hold of what was read.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack

from loraforge_registry import canonical, hub_record, hub_tree_record, refs, strict_json
from loraforge_registry.config import encode_config, parse_config
from loraforge_registry.digest import Digest
from loraforge_registry.errors import (
    ConfigError,
    FormatError,
    HeaderError,
    LoraforgeError,
    ManifestError,
    ReferenceSyntaxError,
    StoreError,
)
from loraforge_registry.header import encode_header, header_length, parse_header
from loraforge_registry.manifest import Manifest, encode_manifest
from loraforge_registry.names import Reference, RefName
from loraforge_registry.records import decode_record
from loraforge_registry.trees import TreeRecord, encode_tree, parent_path
from tests.fuzz import peers


def refused(error: LoraforgeError) -> str:
    """Which function said no."""
    at, found = error.__traceback__, "?"
    while at is not None:
        name = at.tb_frame.f_code.co_name
        if "loraforge_registry" in at.tb_frame.f_code.co_filename and name not in ("<genexpr>", "<listcomp>"):
            found = name
        at = at.tb_next
    return f"refused by {found}"


def same(x: object, y: object) -> bool:
    """Equal in value and type: 1 is not True, and not 1.0."""
    if type(x) is not type(y):
        return False
    if isinstance(x, dict):
        return x.keys() == y.keys() and all(same(x[key], y[key]) for key in x)
    if isinstance(x, list):
        return len(x) == len(y) and all(map(same, x, y))
    return x == y


# --- the header gate ------------------------------------------------------------------------------------------------

# Why a file that the library takes is refused, and what the error says: section 8 of SPEC.md has the same list.
STRICTER: dict[str, str] = {
    "a name or key twice": "stands twice",
    "an unknown field": "expected exactly dtype, shape and data_offsets",
    "a name empty, too long, or with controls": "is empty, over 512 bytes, or has control characters",
    "metadata not a map of strings": "__metadata__ must be an object",
    "more than 16 dimensions": "cannot be",
    "a dimension that no machine can index, beside a zero": "is beyond 2^63 elements",
    "something before { or behind }": "must begin with '{'",
    "too deep, in an unknown field": "nested deeper than",
    "a number spelt -0, in an unknown field": "-0 is not a whole number",
}


def header(data: bytes) -> str:
    theirs = peers.tensors_by_safetensors(data)
    try:
        length = header_length(data[:32], len(data))
        found = parse_header(data[8 : 8 + length], len(data))
    except HeaderError as error:
        return refused(error) if theirs is None else _reason(str(error), STRICTER)
    assert theirs is not None, "accepted, and the library refuses"
    start = found.data_start
    ours = {t.name: (t.dtype, t.shape, data[start + t.begin : start + t.end]) for t in found.tensors}
    assert ours == theirs, "read otherwise than the library reads it"
    written = encode_header((t.name, t.dtype, t.shape) for t in found.tensors)
    again = parse_header(written[8:], len(written) + len(data) - start)
    assert {(t.name, t.dtype, t.shape) for t in again.tensors} == {(n, *row[:2]) for n, row in ours.items()}
    return "accepted"


def _reason(message: str, reasons: dict[str, str]) -> str:
    """Why what the peer takes was refused: there must be a reason."""
    found = next((reason for reason, words in reasons.items() if words in message), None)
    assert found is not None, f"refused for a reason that is not listed: {message}"
    return f"stricter: {found}"


# --- canonical msgpack, and manifests in it -------------------------------------------------------------------------


def codec(data: bytes) -> str:
    try:
        theirs: Any = (peers.canonical_value(data),)
    except peers.NotCanonicalError:
        theirs = None
    try:
        value = canonical.decode(data)
    except ManifestError as error:
        return refused(error) if theirs is None else _reason(str(error), {})
    assert theirs is not None, "accepted, and not the one spelling"
    assert same(value, theirs[0]), "read as another value"
    assert same(value, msgpack.unpackb(data, raw=False)), "msgpack reads another value"
    return "accepted"


def record(data: bytes) -> str:
    try:
        found = decode_record(data)
    except ManifestError as error:
        return refused(error)
    assert len({*found.blobs, *found.needs, *found.lineage}) <= len(data) // 32, "more digests than there is room for"
    if isinstance(found, TreeRecord):
        assert encode_tree(found) == data, "another spelling of the same tree"
        assert all(parent_path(path) in (None, *found.nodes) for path in found.nodes)
        return "a tree"
    assert isinstance(found, Manifest)
    assert encode_manifest(found) == data, "another spelling of the same manifest"
    if found.derivation is not None:
        found.derivation.located({})
    return f"a manifest, {'with' if found.derivation else 'without'} a derivation"


def hub(data: bytes) -> str:
    try:
        found = hub_record.decode_record(data)
    except FormatError as error:
        return refused(error)
    assert Digest.of(encode_manifest(found.manifest)) == found.digest, "another artifact's description"
    assert hub_record.decode_record(hub_record.encode_record(found)) == found
    return "accepted"


def hub_tree(data: bytes) -> str:
    try:
        found = hub_tree_record.decode_tree_record(data)
    except FormatError as error:
        return refused(error)
    if found is None:
        assert not str(json.loads(data).get("schema")).startswith("loraforge.hub-tree/"), "a tree, and passed over"
        return "something else"
    encoded = encode_tree(found.tree)
    assert Digest.of(encoded) == found.digest, "another tree's description"
    assert decode_record(encoded) == found.tree
    assert hub_tree_record.decode_tree_record(hub_tree_record.encode_tree_record(found)) == found
    return "a tree"


# --- refs and names -------------------------------------------------------------------------------------------------


class OneFile:
    """What the readers of refs ask of a store: one file."""

    root = Path("store")

    def __init__(self, data: bytes) -> None:
        self._data = data

    def read(self, directory: str, name: str, limit: int) -> bytes:
        if len(self._data) > limit:
            raise StoreError(f"{directory}/{name}: more than {limit} bytes")
        return self._data


def ref(data: bytes) -> str:
    """A ref's file, or a reflog: by its first byte."""
    files: Any = OneFile(data[1:])
    return _reflog(files, data[1:]) if data[:1] == b"L" else _ref_file(files, data[1:])


def _ref_file(files: Any, data: bytes) -> str:
    good = (
        len(data) == 72
        and data[:7] == b"sha256:"
        and data[71:] == b"\n"
        and peers.is_digest(data[:71].decode("latin-1"))
    )
    try:
        found = refs.read_ref(files, RefName("a", "v1"))
    except StoreError as error:
        assert not good
        return refused(error)
    assert good
    assert f"{found}\n".encode() == data
    return "a ref"


def _reflog(files: Any, data: bytes) -> str:
    moves = refs.read_reflog(files, "a")
    for move in moves:
        line = refs._record(move)
        assert line[:-1] in data.split(b"\n"), "another spelling of the same record"
        assert peers.is_part(move.tag)
        assert abs(move.time) < 2**38, "no time that can be shown"
    lines = [line for line in data.split(b"\n") if line]
    assert len(moves) + refs.damaged_records(files, "a") == len(lines)
    return f"a reflog, {'some' if moves else 'no'} records"


def names(data: bytes) -> str:
    text = data.decode("utf-8", "surrogateescape")
    digest = _parses(Digest.parse, text)
    assert (digest is not None) == peers.is_digest(text)
    assert digest is None or str(digest) == text
    found = _parses(RefName.parse, text)
    name, colon, tag = text.partition(":")
    assert (found is not None) == (peers.is_part(name) and (not colon or peers.is_part(tag)))
    assert found is None or str(found) in (text, f"{text}:latest")
    reference = _parses(Reference.parse, text)
    assert (reference is not None) == peers.is_reference(text)
    if reference is None:
        return "nothing"
    assert (reference.ref is None) != (reference.prefix is None)
    return "a name" if reference.ref else "a digest behind a name" if reference.name else "the beginning of a digest"


def _parses(parse: Callable[[str], Any], text: str) -> Any:
    try:
        return parse(text)
    except ReferenceSyntaxError:
        return None


# --- JSON -----------------------------------------------------------------------------------------------------------

STRICTER_JSON = (
    "stands twice",
    "is not JSON",
    "nested deeper",
    "unpaired surrogate",
    "too large for float64",
    "-0 is",
    "the limit is 5000",
)


def strict(data: bytes) -> str:
    try:
        theirs: Any = (json.loads(data.decode("utf-8")),)
    except (ValueError, RecursionError):
        theirs = None
    try:
        value = strict_json.loads(data, max_bytes=5000, max_depth=8)
    except FormatError as error:
        return refused(error) if theirs is None else _reason(str(error), {words: words for words in STRICTER_JSON})
    assert theirs is not None
    assert same(value, theirs[0])
    json.dumps(value, allow_nan=False).encode()
    return "accepted"


def config(data: bytes) -> str:
    try:
        found = parse_config(data)
    except ConfigError as error:
        return refused(error)
    written = encode_config(found)
    again = parse_config(written)
    assert encode_config(again) == written, "writing is no fixed point"
    assert again.scaling == found.scaling, "written, and read as other ranks or scales"
    for field in ("target_modules", "exclude_modules", "token_indices", "layers_pattern", "layers_to_transform"):
        ours, theirs = getattr(again.settings, field) or None, getattr(found.settings, field) or None
        assert ours == theirs, f"{field} was lost"
    return "accepted"
