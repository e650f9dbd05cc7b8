"""Attacks on a store's inputs that the other tables do not hold: generated, refused by class and sentence, and cheap.

Each runs in a fork that may take 2 seconds of CPU and 256 MB more than it began with. What bad input says on the
command line is ``tests/cli/test_bad_input.py``; what any bytes do, ``tests/property``.
"""

import itertools
import json
import os
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import pytest

from loraforge_registry import canonical
from loraforge_registry.digest import Digest
from loraforge_registry.errors import (
    ConfigError,
    ConflictError,
    FormatError,
    HeaderError,
    KeyMismatchError,
    ManifestError,
    NotFoundError,
    ReferenceSyntaxError,
    StoreError,
)
from loraforge_registry.header import read_header
from loraforge_registry.ingest import open_adapter
from loraforge_registry.names import RefName
from loraforge_registry.store import Store
from tests.attacks import Attack, judge
from tests.bad_files import PREFIX, config, file_bytes, header_fields, pair, tensors, write_adapter
from tests.crash.store_world import in_memory, put, quick_disk, snapshot

HEX = "0123456789abcdef" * 4


# --- weights ------------------------------------------------------------------------------------------------------

DATA = b"".join(raw for _, _, raw in tensors().values())


def file(data: Callable[[], bytes]) -> Callable[[Path], Path]:
    def make(home: Path) -> Path:
        (home / "attack").write_bytes(data())
        return home / "attack"

    return make


def gate(path: Path) -> object:
    with path.open("rb") as opened:
        return read_header(opened.fileno())


def empty_tensors(count: int) -> bytes:
    names = map("".join, itertools.product("abcdefghijklmnopqrstuvwxyz0123456789", repeat=4))
    rows = (f'"{name}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for name in itertools.islice(names, count))
    return file_bytes(f"{{{','.join(rows)}}}".encode())


def adapter(**parts: Any) -> Callable[[Path], Path]:
    return lambda home: write_adapter(home / "bad", **parts)


def push(source: Path) -> object:
    with quick_disk(), open_adapter(source) as incoming:
        return Store(source.parent / "store").put(incoming)


def unaccounted(name: str) -> str:
    return (
        f"'{name}': not accounted for by the config (loading it would overwrite the base's own weights, or silently do "
        "nothing); name the module in target_modules or modules_to_save, or take the tensor out"
    )


def unknown(key: str, value: str) -> str:
    return (
        f"adapter_config.json: {key} = {value} is not known to this version of loraforge, and may change what the "
        "adapter computes"
    )


WEIGHTS = [
    Attack(
        "A7 a zero beside 2^62",
        adapter(weights=tensors() | {f"{PREFIX}z": ("F32", (0, 2**62), b"")}),
        push,
        KeyMismatchError,
        unaccounted("z"),
    ),
    Attack(
        "A9 a tensor called ../x",
        adapter(weights=tensors() | {f"{PREFIX}../x": ("F32", (1,), bytes(4))}),
        push,
        KeyMismatchError,
        unaccounted("../x"),
    ),
    Attack(
        "A11 1,500,000 empty tensors",
        file(lambda: empty_tensors(1_500_000)),
        gate,
        HeaderError,
        "not a safetensors file: 82500009 bytes that announce a header of 82500001, expected 2 to 10485760",
    ),
    Attack(
        "A11 190,000 empty tensors, in 10 MiB",
        file(lambda: empty_tensors(190_000)),
        gate,
        HeaderError,
        "190000 tensors; the limit is 100000",
    ),
    Attack(
        "A16 auto_map",
        adapter(settings=config(auto_map={"AutoModel": "evil.Model"})),
        push,
        ConfigError,
        unknown("auto_map", '{"AutoModel": "evil.Model"}'),
    ),
    Attack(
        "A16 _attn_implementation_internal",
        adapter(settings=config(_attn_implementation_internal="org/kernel")),
        push,
        ConfigError,
        unknown("_attn_implementation_internal", '"org/kernel"'),
    ),
    Attack(
        "A20 rank_pattern of 1,000,000 entries",
        lambda home: write_adapter(home / "bad", settings=config(rank_pattern={f"{i:x}": 2 for i in range(1_000_000)})),
        push,
        FormatError,
        "{home}/bad/adapter_config.json: 11930190 bytes; the limit is 1048576",
    ),
]

# --- msgpack ------------------------------------------------------------------------------------------------------

ROOM = canonical.MAX_BYTES
TOO_MANY = "more than 250000 lists and maps, or 1000000 values in them"
LONG = "not msgpack: ValueError {} exceeds max_array_len(250000)"


def array(item: bytes, count: int) -> bytes:
    """An array in its shortest spelling; 65,536 items or more."""
    return b"\xdd" + struct.pack(">I", count) + item * count


def array_of_arrays(item: bytes, rows: int) -> bytes:
    return b"\xdc" + struct.pack(">H", rows) + array(item, 249_999) * rows


def decode(path: Path) -> object:
    return canonical.decode(path.read_bytes())


def packed(name: str, data: Callable[[], bytes], says: str, act: Callable[[Path], object] = decode) -> Attack:
    return Attack(name, file(data), act, ManifestError, says)


def deep_derivation(depth: int) -> bytes:
    """A value made from a value made from a value, which no encoder of ours would write."""
    derivation: object = None
    for _ in range(depth):
        inputs = [] if derivation is None else [{"derivation": derivation, "weight": 1.0}]
        derivation = {"inputs": inputs, "operation": "x", "parameters": {}, "version": 1}
    return bytes(msgpack.packb(derivation))


MSGPACK = [
    packed("A25 20 MB of empty arrays", lambda: array(b"\x90", 20_000_000),
           f"20000005 bytes of msgpack; the limit is {ROOM}"),
    packed("A25 8 MiB of empty arrays", lambda: array(b"\x90", ROOM - 5), LONG.format(ROOM - 5)),
    packed("A25 8 MiB of empty arrays, in arrays", lambda: array_of_arrays(b"\x90", 33), TOO_MANY),
    packed("A25 8 MiB of empty maps, in arrays", lambda: array_of_arrays(b"\x80", 33), TOO_MANY),
    packed("A25 8 MiB of maps, in arrays", lambda: array_of_arrays(b"\x81\xa1a\xc0", 8), TOO_MANY),
    packed("A25 8 MiB of small numbers, in arrays", lambda: array_of_arrays(b"\x01", 33), TOO_MANY),
    packed("A25 8 MiB of short strings, in arrays", lambda: array_of_arrays(b"\xa2ab", 11), TOO_MANY),
    packed("A32 derivations 40 deep", lambda: deep_derivation(40), "nested deeper than 32"),
    packed("A32 derivations 5,000 deep", lambda: b"\x81\xa1a\x91" * 5000 + b"\xc0", "not msgpack: StackError"),
]  # fmt: skip


# --- manifests and refs in a store --------------------------------------------------------------------------------


def store_at(home: Path) -> Store:
    with quick_disk():
        store = Store(home / "store")
        put(store, write_adapter(home / "good"), RefName("good", "v1"))
    return store


def good_fields(store: Store) -> Any:
    digest = store.resolve("good:v1")
    return canonical.decode((store.path / "manifests/sha256" / digest.hex[:2] / digest.hex).read_bytes())


def planted(edit: Callable[[Any], object]) -> Callable[[Path], Store]:
    """A store with a manifest that has the right digest, and says what no push would."""

    def make(home: Path) -> Store:
        store = store_at(home)
        fields = good_fields(store)
        edit(fields)
        data = canonical.encode(fields)
        digest = Digest.of(data)
        (store.path / "manifests/sha256" / digest.hex[:2] / digest.hex).write_bytes(data)
        (store.path / "refs" / "bad@v1").write_text(f"{digest}\n")
        return store

    return make


def show(store: Store) -> object:
    return store.manifest(store.resolve("bad:v1"))


def pull(store: Store) -> object:
    return store.export(store.resolve("bad:v1"), store.path.parent / "out")


def parents(count: int) -> Callable[[Any], object]:
    """As many as fit a manifest: each would be looked for by every walk of the lineage."""

    def edit(fields: Any) -> None:
        sources = ({"digest": i.to_bytes(32, "big"), "content_id": bytes(32)} for i in range(count))
        inputs = [{"weight": 1.0, "artifact": source} for source in sources]
        fields.update(derivation={"operation": "x", "version": 1, "parameters": {}, "inputs": inputs})

    return edit


def path_of(path: str) -> Attack:
    return Attack(
        f"A33 a file called {path[:20]!r}",
        planted(lambda fields: fields["files"][0].update(path=path)),
        show,
        ManifestError,
        f"file path {path[:80]!r}; expected one of adapter_config.json, adapter_model.safetensors, README.md",
    )


def ref_is(make: Callable[[Path, Store], object]) -> Callable[[Path], Store]:
    def build(home: Path) -> Store:
        store = store_at(home)
        make(store.path / "refs" / "bad@v1", store)
        return store

    return build


def sparse(path: Path, _store: Store) -> None:
    path.touch()
    os.truncate(path, 10 * 2**30)


def a_blob(path: Path, store: Store) -> None:
    path.write_text(f"{store.manifest(store.resolve('good:v1')).files[0].digest}\n")


def bundle_to(target: str) -> Callable[[Store], object]:
    return lambda store: store.export_bundle([store.resolve("good:v1")], {}, store.path.parent / target)


def with_link(home: Path) -> Store:
    store = store_at(home)
    (home / "link").symlink_to(store.path / "refs")
    return store


def export_to(target: str) -> Callable[[Store], object]:
    return lambda store: store.export(store.resolve("good:v1"), store.path.parent / target)


CONFIG = Digest.of(json.dumps(config()).encode())
SIZE = len(json.dumps(config()))
INSIDE = "is inside the store {home}/store; name a"
STORES = [
    *(
        path_of(path)
        for path in ("..", "/etc/passwd", "C:\\x", "CON", "adapter_config.json.", "adapter_config.json ",
                     "Adapter_config.json", "adapter_config.json\0", "sub/adapter_config.json", "x" * 300)
    ),
    Attack("A32 72,000 parents", planted(parents(72_000)), show, ManifestError,
           "an operation on 72000 inputs; the limit is 10000"),
    Attack(
        "A33 a size that is not the file's",
        planted(lambda fields: fields["files"][0].update(size=SIZE + 1)),
        pull,
        StoreError,
        f"{{home}}/store: {CONFIG} has {SIZE} bytes, expected {SIZE + 1}: it is damaged",
    ),
    Attack("A39 a ref of 10 GB", ref_is(sparse), show, StoreError, "{home}/store/refs/bad@v1: more than 73 bytes"),
    Attack("A39 a ref to a file", ref_is(a_blob), show, NotFoundError, f"{CONFIG} is not in the store {{home}}/store"),
    Attack("A46 a bundle into the store", store_at, bundle_to("store/refs/x@v1"), ConflictError,
           f"{{home}}/store/refs/x@v1 {INSIDE} file elsewhere"),
    Attack("A46 a bundle into the store, by ..", store_at, bundle_to("good/../store/x"), ConflictError,
           f"{{home}}/good/../store/x {INSIDE} file elsewhere"),
    Attack("A46 a bundle into the store, by a link", with_link, bundle_to("link/x@v1"), ConflictError,
           f"{{home}}/link/x@v1 {INSIDE} file elsewhere"),
    Attack("A46 a directory into the store, by a link", with_link, export_to("link/x@v1"), ConflictError,
           f"{{home}}/link/x@v1 {INSIDE} directory elsewhere"),
]  # fmt: skip

# --- digests ------------------------------------------------------------------------------------------------------


def digest(name: str, text: str, quoted: str | None = None) -> Attack:
    says = f"{quoted or text!r} is not a digest; expected sha256: or blake3: and 64 lower-case hex digits"
    return Attack(f"A34 {name}", lambda _home: text, Digest.parse, ReferenceSyntaxError, says)


DIGESTS = [
    digest("upper case", f"sha256:{HEX.upper()}"),
    digest("another separator", f"sha256-{HEX}", f"sha256-{HEX}:"),
    digest("63 digits", f"sha256:{HEX[:63]}"),
    digest("65 digits", f"sha256:{HEX}0"),
    digest("SHA-1", f"sha1:{HEX[:40]}"),
    digest("MD5", f"md5:{HEX[:32]}"),
    digest("a newline behind it", f"sha256:{HEX}\n"),
    digest("a space before it", f" sha256:{HEX}"),
    digest("upper-case algorithm", f"SHA256:{HEX}"),
    digest("a path", f"sha256:{'../' * 21}x"),
]

# --- the tests ----------------------------------------------------------------------------------------------------

ATTACKS = [*WEIGHTS, *MSGPACK, *STORES, *DIGESTS]


@pytest.fixture
def home():
    with in_memory() as root:
        yield root


@pytest.mark.parametrize("attack", ATTACKS, ids=[attack.name for attack in ATTACKS])
def test_an_attack(attack, home):
    before, store = None, home / "store"

    def make(home):
        nonlocal before
        made = attack.make(home)
        before = snapshot(store) if attack not in WEIGHTS and store.exists() and "10 GB" not in attack.name else None
        return made

    judge(replace(attack, make=make), home)
    assert before is None or snapshot(store) == before
    assert not (home / "out").exists()


def test_tensors_may_be_listed_in_any_order_and_the_bytes_stay_as_they_were(home):
    """A6."""
    fields = dict(reversed(header_fields(tensors()).items()))
    data = file_bytes(json.dumps(fields).encode(), DATA)
    store = Store(home / "store")
    ours, theirs = (put(store, write_adapter(home / name, weights=weights)) for name, weights in
                    (("a", data), ("b", tensors())))  # fmt: skip
    assert ours.content_id == theirs.content_id
    store.export(ours.digest, home / "out")
    assert (home / "out" / "adapter_model.safetensors").read_bytes() == data


def test_names_that_look_alike_stay_two(home):
    """A10: composed and decomposed letters, upper and lower case."""
    alike = ["caf\u00e9.q", "cafe\u0301.q", "CAF\u00c9.q", "caf\u00c9.q"]
    weights = {key: row for number, name in enumerate(alike) for key, row in pair(name, value=1.0 + number).items()}
    store = Store(home / "store")
    stored = put(store, write_adapter(home / "a", weights=weights, settings=config(target_modules=["q"])))
    assert set(store.layout(store.manifest(stored.digest)).targets) == set(alike)


def test_bytes_of_a_bool_that_are_none_are_data(home):
    """A13."""
    weights = tensors() | {f"{PREFIX}head.weight": ("BOOL", (4,), b"\2\xff\0\1")}
    source = write_adapter(home / "a", weights=weights, settings=config(modules_to_save=["head"]))
    store = Store(home / "store")
    store.export(put(store, source).digest, home / "out")
    assert (home / "out" / "adapter_model.safetensors").read_bytes() == (
        source / "adapter_model.safetensors"
    ).read_bytes()


def test_a_check_says_that_a_manifest_lies_about_a_size(home):
    """A33: also where another manifest has the file's size right, and without reading every byte."""
    store = planted(lambda fields: fields["files"][0].update(size=SIZE + 1))(home)
    bad = store.resolve("bad:v1")
    for deep in (False, True):
        damage = [problem for problem in store.fsck(deep=deep).problems if problem.is_damage]
        assert [(problem.kind, problem.digest) for problem in damage] == [("untrue_manifest", bad)]


def test_what_fits_the_limits_is_read(home):
    """A25 and A32: a manifest as large as the format allows."""
    store = planted(parents(10_000))(home)
    assert len(store.manifest(store.resolve("bad:v1")).derivation.inputs) == 10_000
    store.usage()
    value = [[0, 0, 0]] * 240_000
    assert canonical.decode(canonical.encode(value)) == value
    with pytest.raises(ManifestError, match="more than 250000"):
        canonical.encode([[]] * 250_000)
    assert canonical.encode([[]] * 250_000, max_bytes=None)
