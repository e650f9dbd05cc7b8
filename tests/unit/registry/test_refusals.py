"""Bad input to a store's readers: refused by class and sentence, and cheap (see ``attacks``)."""

import json
import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import loraforge as lf
from loraforge_registry import canonical, refs
from loraforge_registry.config import parse_config
from loraforge_registry.errors import (
    ConfigError,
    FormatError,
    HeaderError,
    KeyMismatchError,
    ManifestError,
    ReferenceSyntaxError,
    StoreError,
)
from loraforge_registry.files import Files
from loraforge_registry.header import read_header
from loraforge_registry.ingest import open_adapter
from loraforge_registry.names import Reference, RefName
from loraforge_registry.records import decode_record
from loraforge_registry.store import Store
from tests.attacks import Attack, judge
from tests.bad_files import config, file_bytes, pair, write_adapter
from tests.crash.store_world import in_memory, put, quick_disk


def attack(act: Callable[[Any], object], error: type, name: str, data: object, says: str) -> Attack:
    return Attack(name, lambda _home: data, act, error, says)


# --- headers ------------------------------------------------------------------------------------------------------


def gate(data: bytes) -> object:
    fd = os.memfd_create("weights")
    os.write(fd, data)
    return read_header(fd)


def sparse_gate(size: int) -> object:
    fd = os.memfd_create("weights")
    os.write(fd, file_bytes(b"{}"))
    os.truncate(fd, size)
    return read_header(fd)


def entry(shape: object = (1,), offsets: object = (0, 4), dtype: str = "F32", name: str = "a") -> bytes:
    return json.dumps({name: {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()


def spelt(text: str, data: bytes = b"") -> bytes:
    return file_bytes(text.encode("utf-8", "surrogatepass"), data)


GOOD = '"dtype":"F32","shape":[1],"data_offsets":[0,4]'
FOUR = bytes(4)
HEADERS = [
    (
        "A1 seven bytes",
        b"\1" * 7,
        "not a safetensors file: 7 bytes that announce a header of 282578800148737, expected 2 to 2",
    ),
    ("A1 no header", file_bytes(b""), "not a safetensors file: 8 bytes that announce a header of 0, expected 2 to 2"),
    (
        "A1 a header longer than the file",
        file_bytes(b"{}", length=100),
        "not a safetensors file: 10 bytes that announce a header of 100, expected 2 to 2",
    ),
    (
        "A1 a header of 2^64-1",
        file_bytes(b"{}", length=2**64 - 1),
        "not a safetensors file: 10 bytes that announce a header of 18446744073709551615, expected 2 to 2",
    ),
    (
        "A1 a header over the limit",
        file_bytes(b"{}" + b" " * 11_000_000),
        "not a safetensors file: 11000010 bytes that announce a header of 11000002, expected 2 to 10485760",
    ),
    ("A2 not UTF-8", file_bytes(b'{"\xff":1}'), "bad safetensors header: not UTF-8 at byte 2"),
    ("A2 a BOM", spelt("\ufeff{}"), "the header must begin with '{' and end with '}' and padding spaces only"),
    ("A2 a leading space", spelt(" {}"), "the header must begin with '{' and end with '}' and padding spaces only"),
    ("A2 padded with NUL", spelt("{}\0\0"), "the header must begin with '{' and end with '}' and padding spaces only"),
    (
        "A2 padded with a newline",
        spelt("{}\n"),
        "the header must begin with '{' and end with '}' and padding spaces only",
    ),
    (
        "A3 a tensor twice",
        spelt(f'{{"a":{{{GOOD}}},"a":{{{GOOD}}}}}', FOUR),
        "bad safetensors header: the key 'a' stands twice in one object",
    ),
    (
        "A3 a key twice",
        spelt(f'{{"a":{{"dtype":"F32",{GOOD}}}}}', FOUR),
        "bad safetensors header: the key 'dtype' stands twice in one object",
    ),
    (
        "A3 metadata twice",
        spelt('{"__metadata__":{"a":"1","a":"2"}}'),
        "bad safetensors header: the key 'a' stands twice in one object",
    ),
    (
        "A4 an unknown field",
        spelt(f'{{"a":{{{GOOD},"x":1}}}}', FOUR),
        "tensor 'a': expected exactly dtype, shape and data_offsets",
    ),
    (
        "A4 metadata with a number",
        spelt('{"__metadata__":{"a":1}}'),
        "__metadata__ must be an object whose values are strings",
    ),
    ("A4 metadata null", spelt('{"__metadata__":null}'), "__metadata__ must be an object whose values are strings"),
    (
        "A5 an overlap",
        spelt(f'{{"a":{{{GOOD}}},"b":{{"dtype":"F32","shape":[1],"data_offsets":[2,6]}}}}', bytes(6)),
        "tensor 'b' begins at 2, expected 4: it overlaps the one before",
    ),
    (
        "A5 a hole",
        file_bytes(entry(offsets=(4, 8)), bytes(8)),
        "tensor 'a' begins at 4, expected 0: it leaves a hole before it",
    ),
    (
        "A5 a zip behind it",
        file_bytes(entry(), FOUR + b"PK\3\4"),
        "the tensors take 4 bytes, the file holds 8 behind its header: there are bytes that belong to no tensor",
    ),
    (
        "A5 out of bounds",
        file_bytes(entry(), bytes(3)),
        "the tensors take 4 bytes, the file holds 3 behind its header: it is cut short",
    ),
    (
        "A7 a negative dimension",
        file_bytes(entry((-1,)), FOUR),
        "tensor 'a': shape holds -1, expected a whole number from 0",
    ),
    ("A7 a fraction", file_bytes(entry((1.5,)), FOUR), "tensor 'a': shape holds 1.5, expected a whole number from 0"),
    ("A7 a bool", file_bytes(entry((True,)), FOUR), "tensor 'a': shape holds True, expected a whole number from 0"),
    (
        "A7 over 2^63",
        file_bytes(entry((2**63 + 1,)), FOUR),
        "tensor 'a': shape [9223372036854775809] is beyond 2^63 elements",
    ),
    (
        "A7 a product of 2^124",
        file_bytes(entry((2**62, 2**62)), FOUR),
        "tensor 'a': shape [4611686018427387904, 4611686018427387904] is beyond 2^63 elements",
    ),
    (
        "A7 17 dimensions",
        file_bytes(entry((1,) * 17), FOUR),
        "tensor 'a': shape [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1] and data_offsets [0, 4] cannot be",
    ),
    (
        "A8 another size",
        file_bytes(entry((2,)), FOUR),
        "tensor 'a': F32 of shape [2] is 8 bytes, its data_offsets hold 4",
    ),
    ("A8 an unknown dtype", file_bytes(entry(dtype="F31"), FOUR), "tensor 'a': unknown dtype 'F31'"),
    (
        "A8 half a byte",
        file_bytes(entry((3,), (0, 1), "F4"), bytes(1)),
        "tensor 'a': F4 of shape [3] is 1.5 bytes, its data_offsets hold 1",
    ),
    (
        "A9 no name",
        file_bytes(entry(name=""), FOUR),
        "tensor name '' is empty, over 512 bytes, or has control characters",
    ),
    (
        "A9 a name of 513 bytes",
        file_bytes(entry(name="x" * 513), FOUR),
        (
            "tensor name 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx' is empty, "
            "over 512 bytes, or has control characters"
        ),
    ),
    (
        "A9 a NUL in a name",
        file_bytes(entry(name="a\0b"), FOUR),
        "tensor name 'a\\x00b' is empty, over 512 bytes, or has control characters",
    ),
    (
        "A9 an ESC in a name",
        file_bytes(entry(name="a\x1bb"), FOUR),
        "tensor name 'a\\x1bb' is empty, over 512 bytes, or has control characters",
    ),
    (
        "A9 U+202E in a name",
        file_bytes(entry(name="a\u202eb"), FOUR),
        "tensor name 'a\\u202eb' is empty, over 512 bytes, or has control characters",
    ),
    (
        "A9 half a character in a name",
        file_bytes(entry(name="a\ud800b"), FOUR),
        "bad safetensors header: an unpaired surrogate in a string",
    ),
    (
        "A12 200,000 deep",
        spelt('{"a":' * 200_000 + "1" + "}" * 200_000),
        "bad safetensors header: nested deeper than 4",
    ),
    (
        "A12 5,000 digits",
        spelt(f'{{"a":{"9" * 5000}}}'),
        "bad safetensors header: a whole number of thousands of digits",
    ),
    ("A12 1e999", spelt('{"a":1e999}'), "bad safetensors header: a number too large for float64"),
    ("A12 NaN", spelt('{"a":NaN}'), "bad safetensors header: NaN is not JSON"),
]

# --- configs ------------------------------------------------------------------------------------------------------


def settings(**changes: object) -> bytes:
    return json.dumps(config(**changes)).encode()


def push(parts: dict[str, Any]) -> object:
    with in_memory() as root, quick_disk(), open_adapter(write_adapter(root / "bad", **parts)) as incoming:
        return Store(root / "store").put(incoming)


def twins(home: Path) -> Path:
    source = write_adapter(home / "bad")
    (source / "Adapter_config.json").write_bytes(settings(r=3))
    return source


def push_directory(source: Path) -> object:
    with quick_disk(), open_adapter(source) as incoming:
        return Store(source.parent / "store").put(incoming)


CONFIGS = [
    ("A17 r of 0", settings(r=0), "adapter_config.json: r is '0', expected a whole number from 1 to 1000000"),
    ("A17 r of -1", settings(r=-1), "adapter_config.json: r is '-1', expected a whole number from 1 to 1000000"),
    (
        "A17 r of 1e9",
        settings(r=10**9),
        "adapter_config.json: r is '1000000000', expected a whole number from 1 to 1000000",
    ),
    ("A17 r of '8'", settings(r="8"), "adapter_config.json: r is '8', expected a whole number from 1 to 1000000"),
    ("A17 r of true", settings(r=True), "adapter_config.json: r is 'True', expected a whole number from 1 to 1000000"),
    ("A17 r of NaN", settings(r=float("nan")), "adapter_config.json: NaN is not JSON"),
    ("A17 alpha of infinity", settings(lora_alpha=float("inf")), "adapter_config.json: Infinity is not JSON"),
    (
        "A17 alpha of 0",
        settings(lora_alpha=0),
        "adapter_config.json: lora_alpha is '0', expected a number of size 1e-12 to 1e+12",
    ),
    (
        "A21 another kind of adapter",
        settings(peft_type="LOHA"),
        "adapter_config.json: peft_type is 'LOHA'; only 'LORA' is supported",
    ),
    (
        "A21 a setting that nobody knows",
        settings(unheard_of=3),
        (
            "adapter_config.json: unheard_of = 3 is not known to this version of loraforge, and may change what the "
            "adapter computes"
        ),
    ),
    (
        "A23 a key twice",
        b'{"peft_type":"LORA","r":2,"r":3}',
        "adapter_config.json: the key 'r' stands twice in one object",
    ),
]
ADAPTERS = [
    (
        "A17 r is not the tensors' own",
        {"settings": config(r=3)},
        "target 'model.layers.0.q': its tensors have rank 2, the config says 3",
    ),
    (
        "A20 a pattern that matches nothing",
        {"settings": config(rank_pattern={"nothing": 2})},
        "rank_pattern 'nothing': announced by the config, but no tensor belongs to it",
    ),
    (
        "A21 DoRA without magnitudes",
        {"settings": config(use_dora=True)},
        "target 'model.layers.0.q': 'model.layers.0.q.lora_magnitude_vector' missing (use_dora=true, lora_bias=false)",
    ),
    (
        "A21 a saved module that is not there",
        {"settings": config(modules_to_save=["head"])},
        "modules_to_save 'head': announced by the config, but no tensor belongs to it",
    ),
]

# --- msgpack ------------------------------------------------------------------------------------------------------

DEEP = b"\x91" * 2000 + b"\xc0"
PACKED = [
    (
        "A24 an array of 2^32-1",
        b"\xdd\xff\xff\xff\xff",
        "not msgpack: ValueError 4294967295 exceeds max_array_len(250000)",
    ),
    ("A24 a map of 2^32-1", b"\xdf\xff\xff\xff\xff", "not msgpack: ValueError 4294967295 exceeds max_map_len(250000)"),
    ("A24 bytes of 2^32-1", b"\xc6\xff\xff\xff\xff", "not msgpack: ValueError Unpack failed: incomplete input"),
    ("A26 2,000 deep", DEEP, "not msgpack: StackError"),
    ("A27 a key twice", b"\x82\xa1a\1\xa1a\2", "not canonical: another spelling of the same value was expected"),
    (
        "A27 keys in another order",
        b"\x82\xa1b\1\xa1a\2",
        "not canonical: another spelling of the same value was expected",
    ),
    ("A27 a key of bytes", b"\x81\xc4\1a\1", "a map key that is not a string"),
    (
        "A27 a key that is a number",
        b"\x81\1\1",
        "not msgpack: ValueError int is not allowed for map key when strict_map_key=True",
    ),
    (
        "A27 a key of nil",
        b"\x81\xc0\1",
        "not msgpack: ValueError NoneType is not allowed for map key when strict_map_key=True",
    ),
    ("A28 a long 1", b"\xcc\1", "not canonical: another spelling of the same value was expected"),
    ("A28 a long string", b"\xd9\1a", "not canonical: another spelling of the same value was expected"),
    ("A28 a long array", b"\xdc\0\1\1", "not canonical: another spelling of the same value was expected"),
    ("A29 something behind it", b"\1\1", "not msgpack: ExtraData unpack(b) received extra data."),
    ("A29 0xc1", b"\xc1", "not msgpack: FormatError"),
    ("A29 cut short", b"\x92\1", "not msgpack: ValueError Unpack failed: incomplete input"),
    (
        "A29 not UTF-8",
        b"\xa1\xff",
        "not msgpack: UnicodeDecodeError 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte",
    ),
    (
        "A29 half a character",
        b"\xa3\xed\xa0\x80",
        "not msgpack: UnicodeDecodeError 'utf-8' codec can't decode byte 0xed in position 0: invalid continuation byte",
    ),
    ("A30 an extension", b"\xd4\5a", "msgpack extension type 5; none is allowed"),
    ("A30 a time", b"\xd6\xff" + struct.pack(">I", 1), "Timestamp is not a type that a manifest can hold"),
    ("A30 NaN", b"\xcb" + struct.pack(">d", float("nan")), "nan is not a number that a manifest can hold"),
    ("A30 -0.0", b"\xcb" + struct.pack(">d", -0.0), "-0.0 is not a number that a manifest can hold"),
]


def good_manifest() -> Any:
    with in_memory() as root, quick_disk():
        store = Store(root / "store")
        digest = put(store, write_adapter(root / "good")).digest
        return canonical.decode((store.path / "manifests/sha256" / digest.hex[:2] / digest.hex).read_bytes())


def manifest(edit: Callable[[Any], object]) -> object:
    fields = good_manifest()
    edit(fields)
    return decode_record(canonical.encode(fields))


MANIFESTS = [
    (
        "A31 an unknown field",
        lambda fields: fields.update(x=1),
        (
            "manifest: the fields ['base', 'content_id', 'derivation', 'files', 'report', 'schema', 'tensors', 'x'], "
            "expected ['schema', 'base', 'content_id', 'derivation', 'files', 'report', 'tensors']"
        ),
    ),
    (
        "A31 a newer schema",
        lambda fields: fields.update(schema="loraforge.manifest/2"),
        "not a manifest: schema is 'loraforge.manifest/2', expected 'loraforge.adapter/1'",
    ),
    (
        "A31 a schema of others",
        lambda fields: fields.update(schema="evil/1"),
        "not a manifest: schema is 'evil/1', expected 'loraforge.adapter/1'",
    ),
    ("A31 files that are no list", lambda fields: fields.update(files={}), "files is dict, expected list"),
    ("A31 a negative size", lambda fields: fields["files"][0].update(size=-1), "size is -1, expected 0 to 2^53"),
    (
        "A31 a size over 2^53",
        lambda fields: fields["files"][0].update(size=2**53 + 1),
        "size is 9007199254740993, expected 0 to 2^53",
    ),
    ("A31 a size that is true", lambda fields: fields["files"][0].update(size=True), "size is bool, expected int"),
    (
        "A33 a path twice",
        lambda fields: fields["files"].append(fields["files"][0]),
        (
            "files ['adapter_config.json', 'adapter_model.safetensors', 'adapter_config.json']: expected config and "
            "weights, each path once, sorted"
        ),
    ),
    (
        "A34 a digest of 31 bytes",
        lambda fields: fields["files"][0].update(digest=bytes(31)),
        (
            "a digest of a wrong length: 'sha256:00000000000000000000000000000000000000000000000000000000000000' is "
            "not a digest; expected sha256: or blake3: and 64 lower-case hex digits"
        ),
    ),
    (
        "A34 a digest as text",
        lambda fields: fields["files"][0].update(digest="0" * 64),
        "digest is str, expected bytes",
    ),
]

# --- names and refs -----------------------------------------------------------------------------------------------

NAMES = [
    "", ".", "..", "a/../b", "a//b", "-a", "/a", "a/", "a.lock", "a~", "a^", "a?", "a*", "a[", "a\\b", "a b", "a\x7f",
    "a\0", "a\n", "\u0661", "a\u202eb", "Foo", "x" * 129,
]  # fmt: skip
TAGS = ["", "V1", "v1:x", "..", "v1/"]
RULE = (
    "is not a {}: expected lower-case letters, digits, '.', '_' and '-', beginning and ending with a letter or digit, "
    "at most 128"
)


def ref_of(data: bytes) -> object:
    with in_memory() as root:
        with quick_disk():
            store = Store(root / "store")
            put(store, write_adapter(root / "good"), RefName("good", "v1"))
        (root / "store/refs/bad@v1").write_bytes(data)
        assert store.resolve("good:v1"), "the others work"
        try:
            return refs.read_ref(Files(root / "store"), RefName("bad", "v1"))
        except StoreError as error:
            raise StoreError(str(error).replace(str(root), "")) from error


REF = b"sha256:" + b"0123456789abcdef" * 4
REFS = [
    ("A39 an empty ref", b"", "the ref bad:v1 is damaged (/store/refs/bad@v1): no newline at its end"),
    (
        "A39 a ref with CRLF",
        REF + b"\r\n",
        (
            "the ref bad:v1 is damaged (/store/refs/bad@v1): "
            "'sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef\\r' is not a digest; expected "
            "sha256: or blake3: and 64 lower-case hex digits"
        ),
    ),
    ("A39 a ref of two lines", (REF + b"\n") * 2, "/store/refs/bad@v1: more than 73 bytes"),
    ("A39 a ref without its end", REF, "the ref bad:v1 is damaged (/store/refs/bad@v1): no newline at its end"),
    (
        "A39 a ref by another digest",
        b"blake3:" + REF[7:] + b"\n",
        "the ref bad:v1 is damaged (/store/refs/bad@v1): blake3 does not name an artifact",
    ),
    ("A39 a ref of 300 bytes", b"x" * 300, "/store/refs/bad@v1: more than 73 bytes"),
]

ATTACKS = [
    *(attack(gate, HeaderError, *row) for row in HEADERS),
    attack(sparse_gate, HeaderError, "A15 a sparse 1 TiB", 2**40,
     "the tensors take 0 bytes, the file holds 1099511627766 behind its header: there are bytes that belong to "
     "no tensor"),
    *(attack(gate, HeaderError, f"A14 {name}", data, says) for name, data, says in (
        ("a zip", b"PK\3\4" + bytes(60),
         ("not a safetensors file: 64 bytes that announce a header of 67324752, expected 2 to 56; it looks like a "
         "zip archive, perhaps a PyTorch pickle: save it as safetensors")),
        ("a pickle", b"\x80\2}q\0." + bytes(60),
         ("not a safetensors file: 66 bytes that announce a header of 50579438895744, expected 2 to 58; it looks "
         "like a Python pickle: save it as safetensors")),
        ("HTML", b"<!DOCTYPE html><html></html>",
         ("not a safetensors file: 28 bytes that announce a header of 5789751444030890300, expected 2 to 20; it "
         "looks like an HTML or XML page, perhaps a failed download")),
        ("a pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
         ("not a safetensors file: 63 bytes that announce a header of 2336927755350992246, expected 2 to 55; it "
         "looks like a Git LFS pointer: fetch the file itself (git lfs pull)")),
    )),
    *(attack(parse_config, ConfigError, *row) for row in CONFIGS),
    *(attack(push, KeyMismatchError, *row) for row in ADAPTERS),
    attack(push, ConfigError, "A18 a pattern of 1 MB", {"settings": config(target_modules="a" * 1_000_000)},
     "a pattern of 1000000 characters; the limit is 8192"),
    attack(push, ConfigError, "A18 a key that closes its group", {"settings": config(rank_pattern={")|x(": 2})},
           "')|x(' is not a regular expression: unbalanced parenthesis at position 0"),
    attack(push, ConfigError, "A18 a pattern that runs away",
           {"settings": config(target_modules="(a|a)*(a|a)*$"), "weights": pair("a" * 40 + "!")},
           f"'(a|a)*(a|a)*$' took too long to match against '{'a' * 40}!'"),
    *(attack(push, ConfigError, f"A18 a pattern that takes all memory, {pattern}",
             {"settings": config(target_modules=pattern), "weights": pair("a" * 40)},
             f"{pattern!r} repeats too much: it stands for more than 200000 characters")
      for pattern in ("a{999999999}", "(?:(?:a{1000}){1000}){1000}", "[ab]{000000000099999999}", "a{99999999,}")),
    Attack("A23 a case twin", twins, push_directory, FormatError,
           "{home}/bad/Adapter_config.json: rename it to adapter_config.json, or remove it"),
    *(attack(canonical.decode, ManifestError, *row) for row in PACKED),
    *(attack(manifest, ManifestError, *row) for row in MANIFESTS),
    *(attack(Reference.parse, ReferenceSyntaxError, f"A35 {name!a:.20}", name, f"{name!r} {RULE.format('name')}")
      for name in NAMES),
    *(attack(Reference.parse, ReferenceSyntaxError, f"A35 a:{tag}", f"a:{tag}", f"{tag!r} {RULE.format('tag')}")
      for tag in TAGS),
    attack(Reference.parse, ReferenceSyntaxError, "A35 a@{1}", "a@{1}",
           "'{1}' is not sha256: and 8 to 64 lower-case hex digits"),
    *(attack(ref_of, StoreError, *row) for row in REFS),
]  # fmt: skip


@pytest.fixture
def home():
    with in_memory() as root:
        yield root


@pytest.mark.parametrize("attack", ATTACKS, ids=[attack.name for attack in ATTACKS])
def test_it_is_refused(attack, home):
    judge(attack, home)


def test_modules_that_a_config_names_are_never_imported(home, monkeypatch):
    """A16: kept as data."""
    (home / "evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(home))
    mapping = {"auto_mapping": {"parent_library": "evil", "base_model_class": "X"}, "megatron_core": "evil"}
    store = Store(home / "store")
    stored = put(store, write_adapter(home / "a", settings=config(**mapping)), RefName("a"))
    lf.load(str(home / "a"))
    assert store.layout(store.manifest(stored.digest)).targets
    assert store.ls()
    assert "evil" not in sys.modules


@pytest.mark.parametrize("base", ["..", "https://me:secret@example.com/x", "hf://me:secret@org/x"])
def test_a_base_is_a_label(home, base, monkeypatch):
    """A19: nothing is opened, not even what is there."""
    (home / "adapters").mkdir()
    write_adapter(home / "adapters" / "a", settings=config(base_model_name_or_path=base))
    (home / "config.json").mkdir()
    monkeypatch.chdir(home / "adapters")
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("it was opened"))
    store = Store(home / "store")
    stored = put(store, Path("a"))
    assert store.manifest(stored.digest).base_name == base
    assert lf.load("a").base.name == base


def test_a_tag_and_one_below_it_are_two_files_and_letters_are_small(home):
    """A36 and A38: a name and its tags are one file each, whatever the file system does with letters."""
    store = Store(home / "store")
    one = put(store, write_adapter(home / "one"), RefName("a"))
    two = put(store, write_adapter(home / "two", settings=config(lora_alpha=8)), RefName("a.b", "a"))
    assert (store.resolve("a"), store.resolve("a.b:a")) == (one.digest, two.digest)
    assert sorted(path.name for path in (home / "store" / "refs").iterdir()) == ["a.b@a", "a@latest"]


@pytest.mark.parametrize("text", ["sha256", "blake3:v1", "sha256:deadbeef", "deadbeef" * 8, "a:" + "0" * 64])
def test_a_name_is_no_digest(text):
    """A37."""
    with pytest.raises(ReferenceSyntaxError, match="could be mistaken for a digest"):
        RefName.parse(text)
