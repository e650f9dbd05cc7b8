"""One value, one spelling: canonical msgpack, digests, names, strict JSON, manifests."""

import json
import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from loraforge_registry import canonical, strict_json
from loraforge_registry.digest import Digest
from loraforge_registry.errors import FormatError, ManifestError, ReferenceSyntaxError
from loraforge_registry.manifest import decode_manifest, encode_manifest
from loraforge_registry.names import Reference, RefName
from tests.strategies import json_values, manifests, mutated, sha256, texts, values

FEW = settings(max_examples=150)
MANY = settings(max_examples=400)


def same(x: object, y: object) -> bool:
    """Equal in value and type: 1 is not True, and not 1.0."""
    if type(x) is not type(y):
        return False
    if isinstance(x, dict):
        return x.keys() == y.keys() and all(same(x[key], y[key]) for key in x)
    if isinstance(x, list):
        return len(x) == len(y) and all(map(same, x, y))
    return x == y


@FEW
@given(values)
def test_decoding_what_was_encoded_gives_the_value(value):
    assert same(canonical.decode(canonical.encode(value)), value)


@FEW
@given(st.dictionaries(texts, values, max_size=6))
def test_the_order_of_keys_does_not_matter(value):
    backwards = dict(reversed(value.items()))
    assert canonical.encode(backwards) == canonical.encode(value)


@MANY
@given(st.binary(max_size=64) | mutated(values.map(canonical.encode)))
@example(b"\xca\x3f\x80\x00\x00")
@example(b"\xcb\x80\x00\x00\x00\x00\x00\x00\x00")
@example(b"\xc7\x00\x05")
@example(b"\x82\xa1a\x01\xa1a\x01")
@example(b"\x81\x00\x00")
@example(b"\xdd\xff\xff\xff\xff")
@example(b"\x91" * 5000)
def test_bytes_are_the_spelling_of_their_value_or_refused(data):
    try:
        value = canonical.decode(data)
    except ManifestError:
        return
    assert canonical.encode(value) == data


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), -0.0, 2**64, -(2**63) - 1, "\ud800", {1: 2}, {b"": 2}, {3}]
)
def test_values_outside_the_format(value):
    for document in (value, [value], {"x": value}):
        with pytest.raises(ManifestError):
            canonical.encode(document)


def test_depth_and_length_are_limited():
    value: object = None
    for _ in range(canonical.MAX_DEPTH):
        value = [value]
    assert canonical.decode(canonical.encode(value)) == value
    with pytest.raises(ManifestError, match="deeper"):
        canonical.encode([value])
    with pytest.raises(ManifestError, match="limit"):
        canonical.encode(bytes(canonical.MAX_BYTES))
    with pytest.raises(ManifestError, match="limit"):
        canonical.decode(bytes(canonical.MAX_BYTES + 1))


@FEW
@given(manifests())
def test_manifests_come_back(manifest):
    data = encode_manifest(manifest)
    assert decode_manifest(data) == manifest
    assert encode_manifest(decode_manifest(data)) == data


@MANY
@given(mutated(manifests().map(encode_manifest)))
def test_a_manifest_is_its_bytes_or_refused(data):
    try:
        manifest = decode_manifest(data)
    except ManifestError:
        return
    assert encode_manifest(manifest) == data


FIELDS = ["schema", "base", "content_id", "derivation", "files", "report", "tensors"]


@FEW
@given(values | st.dictionaries(st.sampled_from(FIELDS), values))
def test_any_value_is_no_manifest(value):
    with pytest.raises(ManifestError):
        decode_manifest(canonical.encode(value))


@FEW
@given(sha256)
def test_digests_come_back(digest):
    assert Digest.parse(str(digest)) == digest
    assert Digest.from_raw(digest.algorithm, digest.raw) == digest
    assert Reference.parse(str(digest)).prefix == digest.hex


@MANY
@given(st.text() | st.text("sha256:blke3-0f", max_size=80) | mutated(sha256.map(lambda d: str(d).encode())))
@example("sha256:" + "0" * 64 + "\n")
@example("sha256:" + "A" * 64)
@example("sha256-" + "0" * 64)
@example("sha256:" + "٣" * 64)
def test_a_text_is_one_digest_or_none(text):
    text = text if isinstance(text, str) else text.decode("latin-1")
    try:
        digest = Digest.parse(text)
    except ReferenceSyntaxError:
        return
    assert str(digest) == text
    assert len(text) == 71
    assert text.isascii()


@pytest.mark.parametrize("raw", [b"", bytes(31), bytes(33)])
def test_a_digest_has_32_bytes(raw):
    with pytest.raises(ReferenceSyntaxError):
        Digest.from_raw("sha256", raw)


@MANY
@given(st.text(max_size=12) | st.text("ab0._-:/@", max_size=12) | st.from_regex(r"[a-z0-9][a-z0-9._-]*(:[a-z0-9]+)?"))
def test_a_name_is_safe_as_a_file_name_or_refused(text):
    try:
        ref = RefName.parse(text)
    except ReferenceSyntaxError:
        return
    assert RefName.parse(str(ref)) == ref
    assert str(ref) in (text, f"{text}:latest")
    for part in (ref.name, ref.tag):
        assert part.isascii()
        assert part == part.lower()
        assert part.isprintable()
        assert not set(part) & set("/\\:@ ")
        assert part not in (".", "..")
        assert len(part) <= 128


@FEW
@given(st.text(max_size=90))
def test_a_reference_is_read_or_refused(text):
    try:
        reference = Reference.parse(text)
    except ReferenceSyntaxError:
        return
    assert (reference.ref is None) != (reference.prefix is None)


def finite(value: object) -> bool:
    if isinstance(value, dict):
        return all(map(finite, value.values()))
    if isinstance(value, list):
        return all(map(finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def loads(data: bytes) -> strict_json.Json:
    return strict_json.loads(data, max_bytes=1000, max_depth=6)


@FEW
@given(json_values)
def test_strict_json_reads_what_json_writes(value):
    data = json.dumps(value).encode()
    try:
        assert same(loads(data), value)
    except FormatError:
        assert len(data) > 1000 or not finite(value) or data.count(b"[") + data.count(b"{") > 6


@MANY
@given(st.binary(max_size=64) | mutated(json_values.map(lambda value: json.dumps(value).encode())))
@example(b'{"a": 1, "a": 1}')
@example(b"1e999")
@example(b"9" * 5000)
@example(b'"\\ud800"')
@example(b"[" * 900)
def test_strict_json_is_no_more_than_json(data):
    try:
        value = loads(data)
    except FormatError:
        return
    assert same(json.loads(data), value)
    assert finite(value)
