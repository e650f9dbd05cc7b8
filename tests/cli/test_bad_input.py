"""Bad input by the table: one line on stderr, the documented exit code, nothing changed on disk, in seconds."""

import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import pytest

from loraforge_cli.main import main
from loraforge_registry import canonical
from loraforge_registry.ingest import open_adapter
from loraforge_registry.names import RefName
from loraforge_registry.store import Store
from tests.bad_files import PREFIX, Tensors, config, file_bytes, floats, header_fields, pair, tensors, write_adapter

CEILING = 60  # seconds: a hang, not a slow machine
USAGE, MISSING, CONFLICT, BROKEN = 2, 3, 4, 5


@dataclass(frozen=True)
class Case:
    """Prepare a home that holds a good store, run a command in it, expect one line and an exit code."""

    name: str
    build: Callable[[Path], object]
    command: str
    code: int
    says: str


class TooSlowError(BaseException):
    """Beyond Exception, so that no handler on the way takes it for an error of the command's."""


@contextmanager
def ceiling():
    def stop(*_: object) -> None:
        raise TooSlowError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(CEILING)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    """Run the command line in this process."""
    monkeypatch.setattr(sys, "argv", ["loraforge", *arguments])
    capsys.readouterr()
    with ceiling(), pytest.raises(SystemExit) as stop:
        main()
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


def contents(*directories: Path) -> dict[str, object]:
    """Every file below directories with its bytes; the cache and the lock files are not contents."""
    found: dict[str, object] = {}
    for directory, _, names in (step for top in directories for step in os.walk(top)):
        for name in names:
            path = Path(directory, name)
            if path.is_file() and not path.is_symlink() and path.stat().st_size < 2**30:
                found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
            else:
                found[str(path)] = "special"
    return {path: what for path, what in found.items() if "/store/index." not in path and "/store/locks/" not in path}


@pytest.fixture(scope="session")
def _template(tmp_path_factory) -> Path:
    """A home with the adapters a and b, as directories and in a store."""
    home = tmp_path_factory.mktemp("template") / "home"
    store = Store(home / "store")
    for name, value in (("a", 0.5), ("b", 0.25)):
        with open_adapter(write_adapter(home / f"{name}-files", weights=tensors(value))) as incoming:
            store.put(incoming, name=RefName(name, "v1"))
    return home


@pytest.fixture
def home(_template, tmp_path, monkeypatch) -> Path:
    """A home of the test's own, whose store it may damage."""
    shutil.copytree(_template, tmp_path / "home")
    return enter(tmp_path / "home", monkeypatch)


@pytest.fixture
def careful_home(_template, tmp_path, monkeypatch) -> Path:
    """A home whose store is everybody's: copying 512 directories for each test would take most of the time."""
    (tmp_path / "home").mkdir()
    for name in ("a-files", "b-files"):
        shutil.copytree(_template / name, tmp_path / "home" / name)
    (tmp_path / "home" / "store").symlink_to(_template / "store")
    return enter(tmp_path / "home", monkeypatch)


def enter(home: Path, monkeypatch) -> Path:
    monkeypatch.chdir(home)
    monkeypatch.setenv("LORAFORGE_STORE", str(home / "store"))
    return home


# --- the weights file ---------------------------------------------------------------------------------------------

HEADER = json.dumps(header_fields(tensors())).encode()
DATA = b"".join(raw for _, _, raw in tensors().values())
FIRST = next(iter(tensors()))
MIB = 1024 * 1024


def weights(name: str, data: bytes | Tensors | Callable[[], bytes], says: str) -> Case:
    def build(home: Path) -> None:
        write_adapter(home / "bad", weights=data() if callable(data) else data)

    return Case(name, build, "push bad/ bad:v1", USAGE, says)


def edited(edit: Callable[[dict[str, Any]], object], data: bytes = DATA) -> bytes:
    """A file whose header's fields were edited."""
    fields = header_fields(tensors())
    edit(fields)
    return file_bytes(json.dumps(fields).encode(), data)


def entry(**changes: object) -> bytes:
    """A file whose first tensor's entry was edited."""
    return edited(lambda fields: fields[FIRST].update(changes))


def renamed(name: str) -> bytes:
    """A file whose first tensor has another name."""
    return edited(lambda fields: fields.update({name: fields.pop(FIRST)}))


def spelt(before: bytes, after: bytes) -> bytes:
    """A file whose header's text was edited."""
    assert before in HEADER
    return file_bytes(HEADER.replace(before, after, 1), DATA)


def shifted(by: int, data: bytes) -> bytes:
    """A file whose last tensor lies elsewhere."""

    def edit(fields: dict[str, Any]) -> None:
        last = list(fields)[-1]
        fields[last]["data_offsets"] = [offset + by for offset in fields[last]["data_offsets"]]

    return edited(edit, data)


HEADERS = [
    weights("weights: empty", b"", "0 bytes that announce"),
    weights("weights: seven bytes", b"\2\0\0\0\0\0\0", "7 bytes that announce"),
    weights("weights: header of length 0", file_bytes(HEADER, DATA, length=0), "a header of 0"),
    weights("weights: header longer than the file", file_bytes(HEADER, DATA, length=10**6), "a header of 1000000"),
    weights("weights: header of 2^64-1 bytes", file_bytes(HEADER, DATA, length=2**64 - 1), f"{2**64 - 1}"),
    weights("weights: header over 10 MiB", lambda: file_bytes(HEADER.ljust(10 * MIB + 1), DATA), "expected 2 to"),
    weights("weights: not UTF-8", file_bytes(b'{"\xff":{}}'), "not UTF-8"),
    weights("weights: byte order mark", file_bytes(b"\xef\xbb\xbf" + HEADER, DATA), "must begin with"),
    weights("weights: space before the header", file_bytes(b" " + HEADER, DATA), "must begin with"),
    weights("weights: NUL padding", file_bytes(HEADER + b"\0\0", DATA), "padding"),
    weights("weights: newline padding", file_bytes(HEADER + b"\n", DATA), "padding"),
    weights("weights: a list", file_bytes(b"[1, 2]", DATA), "must begin with"),
    weights("weights: a tensor twice", spelt(b"{", b'{"%s": 1, ' % FIRST.encode()), "stands twice"),
    weights("weights: a key twice in an entry", spelt(b'"dtype"', b'"dtype": "F32", "dtype"'), "stands twice"),
    weights("weights: a metadata key twice", spelt(b'"format"', b'"format": "x", "format"'), "stands twice"),
    weights("weights: unknown field", entry(extra=1), "expected exactly dtype, shape"),
    weights("weights: field missing", edited(lambda f: f[FIRST].pop("dtype")), "expected exactly dtype, shape"),
    weights("weights: entry is a number", edited(lambda f: f.update({FIRST: 5})), "expected exactly dtype, shape"),
    weights("weights: metadata of numbers", edited(lambda f: f.update(__metadata__={"format": 1})), "__metadata__"),
    weights("weights: metadata null", edited(lambda f: f.update(__metadata__=None)), "__metadata__"),
    weights("weights: hole", shifted(8, DATA + bytes(8)), "leaves a hole"),
    weights("weights: overlap", shifted(-8, DATA), "overlaps"),
    weights("weights: a zip behind the tensors", file_bytes(HEADER, DATA + b"PK\3\4" + bytes(30)), "no tensor"),
    weights("weights: one byte short", file_bytes(HEADER, DATA[:-1]), "cut short"),
    weights("weights: no tensors' data", file_bytes(HEADER), "cut short"),
    weights("weights: negative dimension", entry(shape=[-2, -6]), "shape holds -2"),
    weights("weights: fractional dimension", entry(shape=[2.0, 6]), "shape holds 2.0"),
    weights("weights: dimension true", entry(shape=[True, 12]), "shape holds True"),
    weights("weights: dimension as text", entry(shape=["2", 6]), "shape holds 2"),
    weights("weights: shape is no list", entry(shape=12), "shape is not a list"),
    weights("weights: dimension beyond 2^64", entry(shape=[2**64, 0]), "shape holds"),
    weights("weights: product beyond 2^63", entry(shape=[2**32, 2**32]), "beyond 2^63"),
    weights("weights: a zero that hides a product", entry(shape=[0, 2**62, 2**62], data_offsets=[0, 0]), "2^63"),
    weights("weights: seventeen dimensions", entry(shape=[1] * 17), "cannot be"),
    weights("weights: offsets reversed", entry(data_offsets=[48, 0]), "cannot be"),
    weights("weights: three offsets", entry(data_offsets=[0, 24, 48]), "cannot be"),
    weights("weights: shape and bytes disagree", entry(shape=[2, 5]), "is 40 bytes"),
    weights("weights: unknown dtype", entry(dtype="F31"), "unknown dtype 'F31'"),
    weights("weights: dtype is a list", entry(dtype=["F32"]), "unknown dtype"),
    weights("weights: half a byte", entry(dtype="F4", shape=[97], data_offsets=[0, 48]), "is 48.5 bytes"),
    weights("weights: empty name", renamed(""), "tensor name ''"),
    weights("weights: name of 600 bytes", renamed("x" * 600), "over 512 bytes"),
    weights("weights: NUL in a name", renamed("x\0y"), "control characters"),
    weights("weights: escape in a name", renamed("x\x1b[2Jy"), "control characters"),
    weights("weights: right-to-left override in a name", renamed("x\u202ey"), "control characters"),
    weights("weights: lone surrogate", spelt(b'"F32"', rb'"\ud800"'), "surrogate"),
    weights("weights: 200,000 deep", file_bytes(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"), "deeper than"),
    weights("weights: a number of 5,000 digits", spelt(b"[2, 6]", b"[%s]" % (b"9" * 5000)), "thousands of digits"),
    weights("weights: 1e999", spelt(b"[2, 6]", b"[1e999]"), "too large"),
    weights("weights: NaN", spelt(b"[2, 6]", b"[NaN]"), "NaN is not JSON"),
    weights(
        "weights: Git LFS pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"
    ),
    weights("weights: zip archive", b"PK\3\4" + bytes(100), "a zip archive"),
    weights("weights: pickle", b"\x80\4\x95" + bytes(100), "a Python pickle"),
    weights("weights: HTML", b"<!DOCTYPE html><html></html>", "an HTML"),
    weights("weights: JSON", b'{"error": "not found, try again"}', "JSON text"),
    weights(
        "weights: 100,000 empty tensors",
        lambda: file_bytes(
            json.dumps(
                {f"x{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(100_000)}
            ).encode()
        ),
        "does not begin with",
    ),
]

# --- tensors that no config accounts for --------------------------------------------------------------------------

A, B = (f"{PREFIX}model.layers.0.q.{factor}.weight" for factor in ("lora_A", "lora_B"))
EMBEDDING = [f"{PREFIX}model.layers.0.q.lora_embedding_{factor}" for factor in "AB"]


def changed(edit: Callable[[Tensors], object]) -> Tensors:
    good = tensors()
    edit(good)
    return good


def without(*names: str, **others: Any) -> Tensors:
    return {name: row for name, row in tensors().items() if name not in names} | others


KEYS = [
    weights(
        "tensors: a weight of the base",
        changed(lambda t: t.update({f"{PREFIX}model.layers.0.q.weight": ("F32", (4, 6), bytes(96))})),
        "model.layers.0.q.weight'",
    ),
    weights(
        "tensors: a bias of the base",
        changed(lambda t: t.update({f"{PREFIX}model.layers.0.q.bias": ("F32", (4,), bytes(16))})),
        "not accounted for",
    ),
    weights("tensors: another module", tensors() | pair("model.layers.0.k"), "'model.layers.0.k.lora_A.weight'"),
    weights("tensors: no lora_B", without(B), "lora_B.weight' missing"),
    weights("tensors: no lora_A", without(A), "lora_A.weight' missing"),
    weights("tensors: none", {}, "no LoRA tensors"),
    weights("tensors: no prefix", pair("x") | {"lora_q_down": ("F32", (1,), floats(1))}, "does not begin with"),
    weights("tensors: a pair without a target", changed(lambda t: t.update(pair(""))), "without a target"),
    weights("tensors: rank 3, config 2", tensors(rank=3), "rank 3, the config says 2"),
    weights("tensors: A transposed", changed(lambda t: t.update({A: ("F32", (6, 2), bytes(48))})), "are not a pair"),
    weights(
        "tensors: A and B of two ranks", changed(lambda t: t.update({B: ("F32", (4, 3), bytes(48))})), "not a pair"
    ),
    weights("tensors: whole numbers", changed(lambda t: t.update({A: ("I32", (2, 6), bytes(48))})), "is I32; expected"),
    weights("tensors: rank 0", changed(lambda t: t.update({A: ("F32", (0, 6), b"")})), "not a pair"),
    weights(
        "tensors: factors of one dimension",
        changed(lambda t: t.update({A: ("F32", (2,), bytes(8)), B: ("F32", (2,), bytes(8))})),
        "not a pair",
    ),
    weights(
        "tensors: factors without dimensions",
        changed(lambda t: t.update({A: ("F32", (), bytes(4)), B: ("F32", (), bytes(4))})),
        "not a pair",
    ),
    weights(
        "tensors: factors of six dimensions",
        changed(
            lambda t: t.update({A: ("F32", (2, 6, 1, 1, 1, 1), bytes(48)), B: ("F32", (4, 2, 1, 1, 1, 1), bytes(32))})
        ),
        "not a pair",
    ),
    weights(
        "tensors: embedding factors without dimensions",
        without(A, B, **dict.fromkeys(EMBEDDING, ("F32", (), bytes(4)))),
        "not a pair",
    ),
    weights(
        "tensors: embedding factors of one dimension",
        without(A, B, **dict.fromkeys(EMBEDDING, ("F32", (2,), bytes(8)))),
        "not a pair",
    ),
    weights(
        "tensors: embedding factors of three dimensions",
        without(A, B, **{EMBEDDING[0]: ("F32", (2, 3, 1), bytes(24)), EMBEDDING[1]: ("F32", (4, 2, 1), bytes(32))}),
        "not a pair",
    ),
    weights(
        "tensors: linear and embedding factors of one target",
        changed(lambda t: t.update(dict.fromkeys(EMBEDDING, ("F32", (2, 2), bytes(16))))),
        "unexpected",
    ),
    weights(
        "tensors: magnitude without use_dora",
        changed(lambda t: t.update({f"{PREFIX}model.layers.0.q.lora_magnitude_vector": ("F32", (4,), bytes(16))})),
        "use_dora=false",
    ),
]

# --- adapter_config.json ------------------------------------------------------------------------------------------


def settings(name: str, given: bytes | dict[str, object], says: str, tensors_: Tensors | None = None) -> Case:
    return Case(
        f"config: {name}",
        lambda home: write_adapter(home / "bad", settings=given, weights=tensors_),
        "push bad/ bad:v1",
        USAGE,
        says,
    )


def setting(name: str, value: object, says: str) -> Case:
    return settings(f"{name} = {str(value)[:40]}", config(**{name: value}), says)


def text(key: str, spelling: str, says: str) -> Case:
    """A value that json.dumps would not write."""
    given = json.dumps(config(**{key: "HERE"})).replace('"HERE"', spelling).encode()
    return settings(f"{key} spelt {spelling[:20]}", given, says)


# Each a more doubles the time that a naive matcher takes; 60 of them take longer than anyone waits.
SLOW = f"{'a' * 60}q"
BACKTRACKS = "(a|aa)+$"
CONFIGS = [
    settings("empty", b"", "not JSON"),
    settings("HTML", b"<html>", "not JSON"),
    settings("a list", b"[]", "not an object"),
    settings("a string", b'"LORA"', "not an object"),
    settings("not UTF-8", b'{"peft_type": "\xff"}', "not UTF-8"),
    settings("byte order mark", b"\xef\xbb\xbf{}", "not JSON"),
    settings("lone surrogate", rb'{"peft_type": "LORA", "revision": "\ud800"}', "surrogate"),
    settings("over 1 MiB", json.dumps(config(task_type="x" * MIB)).encode(), "the limit is"),
    settings("100,000 deep", b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "deeper than"),
    settings("40 deep", b'{"a":' * 40 + b"1" + b"}" * 40, "deeper than"),
    settings("a key twice", json.dumps(config()).replace("{", '{"r": 2, ', 1).encode(), "'r' stands twice"),
    settings("no peft_type", config(peft_type=None), "peft_type is 'None'"),
    setting("peft_type", "IA3", "peft_type is 'IA3'"),
    setting("peft_type", ["LORA"], "only 'LORA' is supported"),
    *[setting("r", value, "r is ") for value in (0, -1, 10**9, 10**30, "8", True, 2.0, [2])],
    text("r", "NaN", "NaN is not JSON"),
    text("r", "9" * 5000, "thousands of digits"),
    *[setting("lora_alpha", value, "lora_alpha is ") for value in (0, "4", True, 1e13, [1], 10**400)],
    *[text("lora_alpha", value, "not JSON") for value in ("NaN", "Infinity", "-Infinity")],
    text("lora_alpha", "1e999", "too large"),
    text("lora_alpha", "-5e-324", "lora_alpha"),
    settings("use_dora", config(use_dora=True), "lora_magnitude_vector' missing"),
    setting("use_dora", "yes", "use_dora is 'yes', expected bool"),
    setting("use_rslora", 1, "use_rslora is '1', expected bool"),
    settings("lora_bias", config(lora_bias=True), "lora_B.bias' missing"),
    setting("bias", "some", "bias is 'some', expected none"),
    setting("modules_to_save", ["head"], "modules_to_save 'head'"),
    setting("modules_to_save", "head", "modules_to_save is 'head', expected a list"),
    setting("target_modules", 5, "target_modules is '5'"),
    setting("target_modules", [1], "target_modules is '1'"),
    setting("target_modules", ["q", "v", ""], "none of them empty"),
    setting("target_modules", [], "not accounted for"),
    setting("target_modules", ["q", "v", "nowhere"], "target_modules 'nowhere'"),
    setting("target_modules", "([", "is not a regular expression"),
    setting("target_modules", "(" * 4000, "regular expression"),
    setting("target_modules", "q|v|" + "x" * 9000, "the limit is 8192"),
    settings("target_modules backtracks", config(target_modules=BACKTRACKS), "too long to match", pair(SLOW)),
    settings("exclude_modules backtracks", config(exclude_modules=BACKTRACKS), "too long to match", pair(SLOW)),
    settings("rank_pattern backtracks", config(rank_pattern={BACKTRACKS: 3}), "too long to match", pair(SLOW)),
    settings("alpha_pattern backtracks", config(alpha_pattern={BACKTRACKS: 3}), "too long to match", pair(SLOW)),
    settings(
        "layers_pattern backtracks",
        config(target_modules=["q"], layers_to_transform=[0], layers_pattern="(a|aa)+$"),
        "too long to match",
        pair(f"{SLOW}.0.q"),
    ),
    settings(
        "target_modules nearly too slow, many times",
        config(target_modules=f"[0-9.]*{BACKTRACKS}"),
        "too long to match",
        {k: v for i in range(400) for k, v in pair(f"{i}.{'a' * 27}.q").items()},
    ),
    settings(
        "layers_pattern that splits the rule",
        config(layers_to_transform=[0], layers_pattern="layers|x"),
        "layers",
    ),
    setting("layers_to_transform", [-1], "layers_to_transform is '-1'"),
    setting("layers_to_transform", ["0"], "layers_to_transform is '0'"),
    setting("rank_pattern", {"nowhere": 4}, "rank_pattern 'nowhere'"),
    setting("rank_pattern", {"q": 0}, "rank_pattern['q'] is '0'"),
    setting("rank_pattern", ["q"], "rank_pattern is"),
    setting("alpha_pattern", {"nowhere": 4}, "alpha_pattern 'nowhere'"),
    setting("alpha_pattern", {"q": 0}, "alpha_pattern['q'] is '0'"),
    setting("trainable_token_indices", [-1], "trainable_token_indices is '-1'"),
    setting("trainable_token_indices", {"embed_tokens": [1, 2]}, "trainable_token_indices 'embed_tokens'"),
    setting("trainable_token_indices", {"embed_tokens": 1}, "trainable_token_indices is '1'"),
    setting("init_lora_weights", 5, "init_lora_weights is '5'"),
    settings("magic", config(magic=True), "magic = true is not known"),
    setting("magic\x1b[2J", "on", r"\x1b"),
    setting("use_bdlora", {"nblocks": 2}, "use_bdlora"),
    setting("megatron_config", {"x": 1}, "megatron_config"),
    *[setting(key, {}, key) for key in ("kasa_config", "monteclora_config", "velora_config", "arrow_config", "magic")],
    *[setting("init_lora_weights", value, "init_lora_weights is") for value in ("true", "PiSSA", "foo")],
    settings(
        "a brace that regex reads as a fuzzy match",
        config(target_modules=["q", "v"], alpha_pattern={"(?:z){e<=9}": 2}),
        "brace",
    ),
    settings(
        "all-linear with an output head",
        config(target_modules="all-linear"),
        "lm_head",
        {**tensors(), **pair("lm_head")},
    ),
    settings(
        "a tied output head whose twin is no target",
        config(ensure_weight_tying=True),
        "lm_head",
        {**tensors(), **pair("lm_head")},
    ),
    settings(
        "LoRA on a module that is saved whole",
        config(target_modules=["q", "v"], modules_to_save=["v"]),
        "v.lora_A",
        {**tensors(), f"{PREFIX}model.layers.0.v.weight": ("F32", (1,), floats(1))},
    ),
    settings(
        "a saved tensor of eight-bit floats",
        config(modules_to_save=["head"]),
        "F8_E4M3",
        {**tensors(), f"{PREFIX}head.weight": ("F8_E4M3", (4,), bytes(4))},
    ),
    settings("use_qalora", config(use_qalora=True), "use_qalora = true is not supported"),
    setting("layer_replication", [[0, 4]], "layer_replication"),
    setting("target_parameters", ["experts.up"], "target_parameters"),
    setting("alora_invocation_tokens", [1], "alora_invocation_tokens"),
]


def many_targets(count: int, between: str = "l") -> Tensors:
    names = (f"l.{i}.{between}.q" for i in range(count))
    return {key: row for name in names for key, row in pair(name, rank=1, rows=1, columns=1).items()}


def nowhere(count: int) -> list[str]:
    return [f"n{i}" for i in range(count)]


# Each fits the limits on its own; together a naive comparison of all with all takes minutes.
LARGE = [
    Case(
        f"config: {what} of 80,000 entries that match nothing, 4,000 targets",
        lambda home, given=given: write_adapter(
            home / "bad", settings=config(r=1, **{"target_modules": ["q"], **given()}), weights=many_targets(4000)
        ),
        "push bad/ bad:v1",
        USAGE,
        says,
    )
    for what, given, says in (
        ("rank_pattern", lambda: {"rank_pattern": dict.fromkeys(nowhere(80_000), 3)}, "rank_pattern 'n0'"),
        ("target_modules", lambda: {"target_modules": ["q", *nowhere(80_000)]}, "target_modules 'n0'"),
        ("modules_to_save", lambda: {"modules_to_save": nowhere(80_000)}, "80000 names"),
    )
] + [
    Case(
        "tensors: more than a manifest can hold",
        lambda home: write_adapter(
            home / "bad", settings=config(r=1, target_modules=["q"]), weights=many_targets(15_000, "x" * 210)
        ),
        "push bad/ bad:v1",
        USAGE,
        "tensors",
    )
]

# --- what the source is -------------------------------------------------------------------------------------------

WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"


def instead(file: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    """A good adapter with one file replaced by something else."""

    def build(home: Path) -> None:
        path = write_adapter(home / "bad") / file
        path.unlink()
        make(path)

    return build


def only_pickle(home: Path) -> None:
    instead(WEIGHTS_FILE, lambda path: path.with_name("adapter_model.bin").write_bytes(b"\x80\4."))(home)


def huge(home: Path) -> None:
    os.truncate(write_adapter(home / "bad", weights=file_bytes(HEADER, DATA)) / WEIGHTS_FILE, 2**40)


def nothing(home: Path) -> None:
    pass


SOURCES = [
    Case("source: absent", nothing, "push ./absent x", MISSING, "absent: no such file"),
    Case("source: a directory without an adapter", nothing, "push store/refs/ x", MISSING, "no adapter_model"),
    Case("source: only a pickle", only_pickle, "push bad/ x", USAGE, "is a pickle"),
    Case("source: no config", instead(CONFIG_FILE, lambda _: None), "push bad/ x", MISSING, "no adapter_config.json"),
    Case("source: /dev/zero", nothing, "push /dev/zero x", MISSING, "no adapter_config.json"),
    Case("source: URL", nothing, "push hf://org/name x", USAGE, "a URL; name a directory"),
    Case("source: no such user's home", nothing, "push ~no-such-user/x x", MISSING, "no-such-user"),
    Case("source: path too long", nothing, f"push ./{'x' * 300} x", BROKEN, "File name too long"),
    Case("source: name too long", nothing, f"show {'x' * 300}", USAGE, "is not a name"),
    Case("source: nothing", nothing, "show ''", USAGE, "''"),
    Case(
        "source: twin of the config",
        lambda home: shutil.copy(write_adapter(home / "bad") / CONFIG_FILE, home / "bad" / "Adapter_Config.json"),
        "push bad/ x",
        USAGE,
        "Adapter_Config.json: rename it",
    ),
    Case("source: sparse file of 1 TiB", huge, "push bad/ x", USAGE, "no tensor"),
    Case("source: weights are a FIFO", instead(WEIGHTS_FILE, os.mkfifo), "push bad/ x", USAGE, "not a regular file"),
    Case("source: config is a FIFO", instead(CONFIG_FILE, os.mkfifo), "push bad/ x", USAGE, "not a regular file"),
    Case("source: weights are a directory", instead(WEIGHTS_FILE, Path.mkdir), "push bad/ x", USAGE, "not a regular"),
    Case("source: config is a directory", instead(CONFIG_FILE, Path.mkdir), "push bad/ x", USAGE, "not a regular file"),
    Case(
        "source: weights are a device",
        instead(WEIGHTS_FILE, lambda p: p.symlink_to("/dev/zero")),
        "push bad/ x",
        USAGE,
        "not a regular file",
    ),
    Case(
        "source: config is a device",
        instead(CONFIG_FILE, lambda p: p.symlink_to("/dev/zero")),
        "push bad/ x",
        USAGE,
        "not a regular file",
    ),
    Case(
        "source: weights link to themselves",
        instead(WEIGHTS_FILE, lambda p: p.symlink_to(p.name)),
        "push bad/ x",
        BROKEN,
        "symbolic links",
    ),
    Case(
        "source: config links to itself",
        instead(CONFIG_FILE, lambda p: p.symlink_to(p.name)),
        "push bad/ x",
        BROKEN,
        "symbolic links",
    ),
    Case(
        "source: README over 4 MiB",
        lambda home: os.truncate(_touch(write_adapter(home / "bad") / "README.md"), 5 * MIB),
        "push bad/ x",
        USAGE,
        "README.md: 5242880 bytes",
    ),
    Case(
        "source: bad weights, shown",
        lambda home: write_adapter(home / "bad", weights=b"<html>"),
        "show bad/",
        USAGE,
        "adapter_model.safetensors: not a safetensors",
    ),
    Case(
        "source: bad weights, compared",
        lambda home: write_adapter(home / "bad", weights=b"<html>"),
        "diff a-files/ bad/",
        USAGE,
        "bad",
    ),
]


def _touch(path: Path) -> Path:
    path.touch()
    return path


# --- arguments ----------------------------------------------------------------------------------------------------

HEX = "0123456789abcdef" * 4


def argument(command: str, code: int, says: str) -> Case:
    return Case(f"arguments: {command[:70]}", nothing, command, code, says)


NOT_NAMES = [
    *(
        "",
        ".",
        "..",
        "a/../b",
        "a//b",
        "/a",
        "a/",
        "a..b",
        ".a",
        "a.",
        "_a",
        "a_",
        "a.lock",
        "a@{",
        "a\\b",
        "a b",
        "a\n",
    ),
    *(f"a{character}" for character in "~^?*[% \t\x7f\x1b"),
    *("A", "é", "٣", "a\u202e", "\u212a", "x" * 129),
]
ARGUMENTS = [
    argument("pusch a/ x", USAGE, "did you mean 'push'?"),
    argument("--no-such-option ls", USAGE, "No such option"),
    argument("push", USAGE, "Missing argument"),
    argument("pull a:v1", USAGE, "--to"),
    argument("pull hf://org/name/more --to out", USAGE, "hf://ORG/REPO"),
    argument("compose a:v1", USAGE, "--as NAME"),
    argument("rerank a:v1 --rank 1", USAGE, "--as NAME"),
    argument("rerank a:v1 --rank x --as c:v1", USAGE, "not a valid integer"),
    argument("compose recipe.yaml --as c:v1", MISSING, "no such file"),
    argument("compose a:v1=0.5x b:v1 --as c:v1", USAGE, "'0.5x' is not a weight"),
    argument("compose a:v1= b:v1 --as c:v1", USAGE, "is not a weight"),
    argument("compose a:v1 --method magic --as c:v1", USAGE, "magic"),
    *[argument(f"tag a:v1 {shlex.quote(name)}", USAGE, "is not a name") for name in NOT_NAMES],
    argument("tag a:v1 c:", USAGE, "is not a tag"),
    argument("tag a:v1 c:V1", USAGE, "is not a tag"),
    argument("tag a:v1 c:v1:v2", USAGE, "is not a tag"),
    argument("tag a:v1 c:v1/v2", USAGE, "is not a tag"),
    argument("tag a:v1 -- -c", USAGE, "is not a name"),
    argument("tag a:v1 sha256", USAGE, "mistaken for a digest"),
    argument(f"tag a:v1 {HEX}", USAGE, "mistaken for a digest"),
    argument(f"tag a:v1 c:{HEX}", USAGE, "mistaken for a digest"),
    argument(f"tag a:v1 sha256:{HEX}", USAGE, "mistaken for a digest"),
    argument("show a:", USAGE, "is not a tag"),
    argument("show a@", USAGE, "is not sha256:"),
    argument("show a@latest", USAGE, "is not sha256:"),
    argument("show sha256:", USAGE, "is not sha256:"),
    argument("show sha256:0123456", USAGE, "8 to 64"),
    argument(f"show sha256:{HEX}0", USAGE, "8 to 64"),
    argument(f"show sha256:{HEX.upper()}", USAGE, "lower-case"),
    argument(f"show blake3:{HEX}", USAGE, "is not sha256:"),
    argument(f"show sha1:{HEX[:40]}", MISSING, "there is no sha1"),
    argument(f"show 'sha256:{HEX}\n'", USAGE, "8 to 64"),
    argument("show absent", MISSING, "there is no absent:latest"),
    argument("show a", MISSING, "there is a:v1"),
    argument(f"show sha256:{HEX}", MISSING, "begins with sha256:0123"),
    argument(f"show a@sha256:{HEX}", MISSING, "begins with sha256:0123"),
    argument("pull absent:v1 --to out", MISSING, "there is no absent:v1"),
    argument("log absent:v1", MISSING, "there is no absent:v1"),
    argument("log --reflog absent", MISSING, "no history"),
    argument("log --reflog ../a", USAGE, "is not a name"),
    argument("diff a:v1 absent:v1", MISSING, "there is no absent:v1"),
    argument("tag absent:v1 c:v1", MISSING, "there is no absent:v1"),
    argument("rm absent:v1", MISSING, "there is no absent:v1"),
    argument("rm a:v1 absent:v1", MISSING, "there is no absent:v1"),
    argument("rm ../refs/a@v1", USAGE, "is not a name"),
    argument(f"rm sha256:{HEX}", USAGE, "digest"),
    argument("ls ../a", USAGE, "is not a name"),
    argument("compose a:v1 absent:v1 --as c:v1", MISSING, "there is no absent:v1"),
    argument("tag b:v1 a:v1", CONFLICT, "--force"),
    argument("push a:v1 b:v1", CONFLICT, "--force"),
    argument("pull a:v1 --to b-files", CONFLICT, "exists already"),
    argument("pull a:v1 --to a-files/adapter_config.json", CONFLICT, "exists already"),
    argument("pull a:v1 --to a-files/adapter_config.json/x", BROKEN, "adapter_config.json"),
    argument("pull a:v1 --to .", CONFLICT, "exists already"),
    argument("pull a:v1 --to ''", USAGE, "--to is empty"),
    argument("pull a:v1 --to store", CONFLICT, "inside the store"),
    argument("pull a:v1 --to store/refs/new", CONFLICT, "store"),
    argument("pull a:v1 --to ~no-such-user/x", MISSING, "no-such-user"),
    argument("pull a:v1 --to /proc/no/such", BROKEN, "/proc/no"),
    argument("--store a-files push b-files/ x", BROKEN, "not a loraforge store"),
    argument("--store a-files/adapter_config.json ls", BROKEN, "is not a directory"),
    argument("--store /dev/null/x ls", BROKEN, "is not a directory"),
    argument("--store /proc/no/such push a-files/ x", BROKEN, "/proc/no"),
    argument("--store ~no-such-user/x ls", MISSING, "no-such-user"),
]

# --- what cannot be computed --------------------------------------------------------------------------------------

NAN, INF, BIG = floats(float("nan")), floats(float("inf")), floats(3e38)


def computed(name: str, edit: Callable[[Tensors], object] | dict[str, object], command: str, says: str) -> Case:
    """A sound directory whose numbers, or whose function, an operation refuses."""

    def build(home: Path) -> None:
        if callable(edit):
            write_adapter(home / "bad", weights=changed(edit))
        else:
            write_adapter(home / "bad", settings=config(**edit))

    return Case(f"algebra: {name}", build, command, USAGE, says)


def put(raw: bytes, *names: str) -> Callable[[Tensors], object]:
    """Replace the last number of tensors."""

    def edit(found: Tensors) -> None:
        for name in names:
            dtype, shape, data = found[name]
            found[name] = (dtype, shape, data[:-4] + raw)

    return edit


def all_big(found: Tensors) -> None:
    for name, (dtype, shape, data) in found.items():
        found[name] = (dtype, shape, BIG * (len(data) // 4))


def dora(home: Path) -> None:
    magnitudes: Tensors = {
        name.replace(".lora_A.weight", ".lora_magnitude_vector"): ("F32", (4,), floats(1, 2, 3, 4))
        for name in tensors()
        if "lora_A" in name
    }
    write_adapter(home / "bad", weights=tensors() | magnitudes, settings=config(use_dora=True))


def wider(home: Path) -> None:
    write_adapter(home / "bad", weights=tensors(columns=8))


def two_bases(home: Path) -> None:
    write_adapter(home / "bad", settings=config(base_model_name_or_path="one"))
    write_adapter(home / "other", settings=config(base_model_name_or_path="two"))


ALGEBRA = [
    computed("compose with NaN", put(NAN, A), "compose bad/=0.5 b-files/=0.5 --as c:v1", "A holds nan at [1, 5]"),
    computed("compose with infinity", put(INF, B), "compose bad/ b-files/ --as c:v1", "B holds inf at [3, 1]"),
    computed("rerank with NaN", put(NAN, A), "rerank bad/ --rank 1 --as c:v1", "A holds nan at [1, 5]"),
    computed("rerank with infinity", put(INF, B), "rerank bad/ --rank 1 --as c:v1", "B holds inf"),
    computed("diff with NaN", put(NAN, A), "diff bad/ b-files/", "A holds nan at [1, 5]"),
    computed("diff with infinity", put(INF, A), "diff b-files/ bad/", "A holds inf at [1, 5]"),
    computed("a sum beyond float32", all_big, "compose bad/=1e12 b-files/=1 --as c:v1", "inf"),
    computed("a re-rank beyond float32", all_big, "compose bad/=1e12 b-files/=1 --rank 1 --as c:v1", "inf"),
    *[
        computed(f"weight {weight}", put(floats(1), A), f"compose bad/={weight} b-files/=1 --as c:v1", says)
        for weight, says in (
            ("nan", "finite"),
            ("inf", "finite"),
            ("-inf", "finite"),
            ("1e999", "finite"),
            ("1e300", "inf"),
        )
    ],
    computed("a single weight that is too large", put(floats(1), A), "compose bad/=1e300 --as c:v1", "alpha"),
    *[
        computed(f"rerank {options}", put(floats(1), A), f"rerank bad/ {options} --as c:v1", says)
        for options, says in (
            ("", "exactly one"),
            ("--rank 0", "rank is 0"),
            ("--rank -1", "rank is -1"),
            (f"--rank {10**30}", "rank"),
            ("--rank 1 --energy 0.5", "exactly one"),
            ("--energy 0", "energy is 0"),
            ("--energy nan", "energy is nan"),
            ("--energy 1.5", "energy is 1.5"),
            ("--max-params 1", "max_parameters 1 is less"),
            (f"--max-params {10**30}", "max_parameters"),
            ("--energy 0.5 --min-rank 0", "min_rank is 0"),
            ("--energy 0.5 --min-rank 3 --max-rank 2", "max_rank 2 is below"),
            ("--rank 1 --max-rank 2", "go with energy"),
        )
    ],
    computed("PiSSA", {"init_lora_weights": "pissa"}, "compose bad/ b-files/ --as c:v1", "init_lora_weights='pissa'"),
    Case("algebra: DoRA", dora, "compose bad/ b-files/ --as c:v1", USAGE, "DoRA magnitude"),
    Case("algebra: DoRA re-ranked", dora, "rerank bad/ --rank 1 --as c:v1", USAGE, "DoRA magnitude"),
    Case("algebra: other shapes", wider, "compose bad/ b-files/ --as c:v1", USAGE, "different bases"),
    Case("algebra: other bases", two_bases, "compose bad/ other/ --as c:v1", USAGE, "'one' and 'two'"),
]

# --- a damaged store ----------------------------------------------------------------------------------------------


def stored(home: Path, name: str, file: str | None = None) -> Path:
    """Where the manifest of an artifact lies, or one of its files."""
    hexadecimal = (home / "store" / "refs" / name).read_text()[7:71]
    manifest = home / "store" / "manifests" / "sha256" / hexadecimal[:2] / hexadecimal
    if file is None:
        return manifest
    files: Any = msgpack.unpackb(manifest.read_bytes())["files"]
    digest = next(row["digest"].hex() for row in files if row["path"] == file)
    return home / "store" / "blobs" / "sha256" / digest[:2] / digest


def rewrite(path: Path, edit: Callable[[bytes], bytes]) -> None:
    """Change a read-only file."""
    data = edit(path.read_bytes())
    path.unlink()
    path.write_bytes(data)


def plant(home: Path, data: bytes, ref: str = "bad@v1") -> str:
    """Put bytes into the store as a manifest with the right digest, and point a ref at it."""
    digest = hashlib.sha256(data).hexdigest()
    path = home / "store" / "manifests" / "sha256" / digest[:2] / digest
    path.write_bytes(data)
    (home / "store" / "refs" / ref).write_text(f"sha256:{digest}\n")
    return digest


def fields_of(home: Path, ref: str = "a@v1") -> dict[str, Any]:
    found: Any = msgpack.unpackb(stored(home, ref).read_bytes())
    return found


def manifest(name: str, edit: Callable[[dict[str, Any]], object], says: str, command: str = "show bad:v1") -> Case:
    """A canonical manifest with edited fields."""

    def build(home: Path) -> None:
        fields = fields_of(home)
        edit(fields)
        plant(home, canonical.encode(fields))

    return Case(f"manifest: {name}", build, command, USAGE, says)


def packed(name: str, edit: Callable[[bytes], bytes], says: str) -> Case:
    """Any bytes in place of a manifest."""
    return Case(
        f"manifest: {name}",
        lambda home: plant(home, edit(stored(home, "a@v1").read_bytes())),
        "show bad:v1",
        USAGE,
        says,
    )


def ref(name: str, edit: Callable[[bytes], bytes]) -> Case:
    return Case(f"ref: {name}", lambda home: rewrite(home / "store/refs/a@v1", edit), "show a:v1", BROKEN, "refs/a@v1")


def replaced(path: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    """A file or directory of the store replaced by something else."""

    def build(home: Path) -> None:
        found = home / "store" / path
        if found.is_dir():
            found.rename(home / "moved")
        else:
            found.unlink()
        make(found)

    return build


def blob(file: str, edit: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda home: rewrite(stored(home, "a@v1", file), edit)


def flip(position: int) -> Callable[[bytes], bytes]:
    def edit(data: bytes) -> bytes:
        changed = bytearray(data)
        changed[position] ^= 1
        return bytes(changed)

    return edit


def derived(parameters: object) -> dict[str, object]:
    return {"operation": "x", "version": 1, "inputs": [], "parameters": parameters}


def deep(home: Path) -> None:
    plant(home, b"\x91" * 2000 + b"\xc0")


def ambiguous(home: Path) -> None:
    for last in "01":
        (home / "store/manifests/sha256/aa" / f"{'a' * 63}{last}").write_bytes(b"")


STORES = [
    Case(
        "store: newer format",
        lambda home: rewrite(home / "store/FORMAT", lambda _: b"loraforge-store 2\n"),
        "ls",
        BROKEN,
        "upgrade loraforge",
    ),
    Case("store: empty FORMAT", lambda home: rewrite(home / "store/FORMAT", lambda _: b""), "ls", BROKEN, "FORMAT"),
    Case("store: no FORMAT", lambda home: (home / "store/FORMAT").unlink(), "ls", BROKEN, "no FORMAT file"),
    Case(
        "store: no FORMAT, push", lambda home: (home / "store/FORMAT").unlink(), "push a-files/ x", BROKEN, "no FORMAT"
    ),
    Case("store: FORMAT is a directory", replaced("FORMAT", Path.mkdir), "ls", BROKEN, "FORMAT"),
    Case("store: FORMAT is a FIFO", replaced("FORMAT", os.mkfifo), "ls", BROKEN, "FORMAT"),
    Case("store: FORMAT is a device", replaced("FORMAT", lambda p: p.symlink_to("/dev/zero")), "ls", BROKEN, "FORMAT"),
    Case("store: refs is a link", replaced("refs", lambda p: p.symlink_to("../moved")), "ls", BROKEN, "refs"),
    Case("store: refs is a file", replaced("refs", Path.touch), "ls", BROKEN, "refs"),
    Case("store: refs is gone", replaced("refs", lambda _: None), "ls", BROKEN, "refs"),
    Case("store: refs is gone, show", replaced("refs", lambda _: None), "show a:v1", BROKEN, "refs"),
    Case("store: tmp is a link", replaced("tmp", lambda p: p.symlink_to("../moved")), "push a-files/ x", BROKEN, "tmp"),
    Case(
        "store: a lock is a link",
        replaced("locks/gc", lambda p: p.symlink_to("/etc/passwd")),
        "push a-files/ x",
        BROKEN,
        "gc",
    ),
    Case("store: reflog is a FIFO", replaced("reflog/a", os.mkfifo), "log --reflog a", BROKEN, "reflog"),
    ref("empty", lambda _: b""),
    ref("two lines", lambda data: data * 2),
    ref("CRLF", lambda data: data[:-1] + b"\r\n"),
    ref("no newline", lambda data: data[:-1]),
    ref("no newline, a byte more", lambda data: data[:-1] + b"0"),
    ref("upper case", lambda data: data.upper()),
    ref("another algorithm", lambda data: data.replace(b"sha256", b"blake3")),
    ref("a megabyte", lambda _: b"x" * MIB),
    ref("zeros", lambda data: bytes(len(data))),
    ref("not ASCII", lambda _: b"\xff" * 71 + b"\n"),
    Case("ref: a link", replaced("refs/a@v1", lambda p: p.symlink_to("b@v1")), "show a:v1", BROKEN, "a@v1"),
    Case("ref: a FIFO", replaced("refs/a@v1", os.mkfifo), "show a:v1", BROKEN, "a@v1"),
    Case("ref: a directory", replaced("refs/a@v1", Path.mkdir), "show a:v1", BROKEN, "a@v1"),
    Case("ref: a directory, removed", replaced("refs/a@v1", Path.mkdir), "rm a:v1", BROKEN, "a@v1"),
    Case(
        "ref: damaged, usage", lambda home: rewrite(home / "store/refs/a@v1", lambda _: b""), "du", BROKEN, "ref a:v1"
    ),
    Case(
        "ref: of nothing",
        lambda home: (home / "store/refs/bad@v1").write_text(f"sha256:{HEX}\n"),
        "show bad:v1",
        MISSING,
        "is not in the store",
    ),
    Case("digest: of two artifacts", ambiguous, "show sha256:aaaaaaaa", USAGE, "beginning of 2 artifacts"),
    Case(
        "manifest: another one's bytes",
        lambda home: rewrite(stored(home, "a@v1"), lambda _: stored(home, "b@v1").read_bytes()),
        "show a:v1",
        BROKEN,
        "damaged",
    ),
    Case(
        "manifest: a bit flipped", lambda home: rewrite(stored(home, "a@v1"), flip(50)), "show a:v1", BROKEN, "damaged"
    ),
    Case(
        "manifest: cut short",
        lambda home: rewrite(stored(home, "a@v1"), lambda d: d[:-1]),
        "tag a:v1 c",
        BROKEN,
        "damaged",
    ),
    Case(
        "manifest: a bit flipped, usage", lambda home: rewrite(stored(home, "a@v1"), flip(50)), "du", BROKEN, "damaged"
    ),
    Case("manifest: over the limit", lambda home: plant(home, bytes(9 * MIB)), "show bad:v1", BROKEN, "more than"),
    Case("manifest: 2,000 deep", deep, "show bad:v1", USAGE, "not msgpack"),
    packed("empty", lambda _: b"", "not msgpack"),
    packed("trailing bytes", lambda data: data + b"\xc0", "not msgpack"),
    packed("array of 2^32-1", lambda _: b"\xdd\xff\xff\xff\xff", "not msgpack"),
    packed("map of 2^32-1", lambda _: b"\xdf\xff\xff\xff\xff", "not msgpack"),
    packed("bytes of 2^32-1", lambda _: b"\xc6\xff\xff\xff\xff", "not msgpack"),
    packed("the byte that is no msgpack", lambda _: b"\xc1", "not msgpack"),
    packed("not UTF-8", lambda data: data.replace(b"base", b"b\xffse", 1), "not msgpack"),
    packed("extension type", lambda _: b"\x81\xa1a\xd4\x05\x00", "extension type 5"),
    packed("timestamp", lambda _: b"\x81\xa1a\xd6\xff\x00\x00\x00\x00", "Timestamp"),
    packed("a key twice", lambda _: b"\x82\xa1a\x01\xa1a\x02", "not canonical"),
    packed("keys not sorted", lambda _: b"\x82\xa1b\x01\xa1a\x02", "not canonical"),
    packed("a key that is a number", lambda _: b"\x81\x01\x02", "not msgpack"),
    packed("a key that is bytes", lambda _: b"\x81\xc4\x01a\x02", "key"),
    packed("a long integer", lambda _: b"\x81\xa1a\xcd\x00\x01", "not canonical"),
    packed("a long string", lambda _: b"\x81\xd9\x01a\x01", "not canonical"),
    packed("a short float", lambda _: b"\x81\xa1a\xca\x3f\x80\x00\x00", "not canonical"),
    packed("NaN", lambda _: b"\x81\xa1a\xcb\x7f\xf8\0\0\0\0\0\0", "nan"),
    packed("minus zero", lambda _: b"\x81\xa1a\xcb\x80\0\0\0\0\0\0\0", "-0.0"),
    packed("a number", lambda _: b"\x05", "record is int"),
    manifest("newer schema", lambda f: f.update(schema="loraforge.adapter/2"), "upgrade loraforge"),
    manifest("another schema", lambda f: f.update(schema="x"), "not a manifest"),
    manifest("schema is a number", lambda f: f.update(schema=1), "not a manifest"),
    manifest("unknown field", lambda f: f.update(extra=1), "the fields"),
    manifest("field missing", lambda f: f.pop("report"), "the fields"),
    manifest("path with dots", lambda f: f["files"][0].update(path="../x"), "file path '../x'"),
    manifest("a path twice", lambda f: f["files"].append(f["files"][-1]), "each path once"),
    manifest("no weights", lambda f: f["files"].pop(), "expected config and weights"),
    manifest("negative size", lambda f: f["files"][0].update(size=-1), "size is -1"),
    manifest("size over 2^53", lambda f: f["files"][0].update(size=2**53 + 1), "expected 0 to 2^53"),
    manifest("size true", lambda f: f["files"][0].update(size=True), "size is bool"),
    manifest("short digest", lambda f: f["files"][0].update(digest=b"x"), "wrong length"),
    manifest("digest as text", lambda f: f["files"][0].update(digest="x" * 32), "digest is str"),
    manifest("a tensor twice", lambda f: f["tensors"].append(f["tensors"][-1]), "stands twice"),
    manifest("tensor of five fields", lambda f: f["tensors"][0].pop(), "expected 6"),
    manifest("negative dimension", lambda f: f["tensors"][0][2].append(-1), "shape is -1"),
    manifest("tensors that are not the file's", lambda f: f["tensors"].pop(), "lora_B.weight' missing"),
    manifest("report is a list", lambda f: f.update(report=[]), "report is list"),
    manifest("report of a number", lambda f: f.update(report={"targets": 5}), "report"),
    manifest("report of numbers", lambda f: f.update(report={"targets": {"x": 5}}), "report"),
    manifest("report of text", lambda f: f.update(report={"targets": {"model.layers.0.q": {"error": "x"}}}), "report"),
    manifest("report of bytes", lambda f: f.update(report={"x": b"\0"}), "report"),
    manifest("derivation of a number", lambda f: f.update(derivation=5), "derivation is int"),
    manifest(
        "an input of nothing", lambda f: f.update(derivation=derived({}) | {"inputs": [{"weight": 1.0}]}), "input"
    ),
    manifest("parameters of bytes", lambda f: f.update(derivation=derived({"x": b"\0"})), "parameter"),
    Case("blob: config cut short", blob(CONFIG_FILE, lambda d: d[:-1]), "show a:v1", BROKEN, "damaged"),
    Case("blob: config flipped", blob(CONFIG_FILE, flip(20)), "show a:v1", BROKEN, "damaged"),
    Case(
        "blob: config gone",
        lambda home: stored(home, "a@v1", CONFIG_FILE).unlink(),
        "show a:v1",
        MISSING,
        "not in the store",
    ),
    Case("blob: weights cut short", blob(WEIGHTS_FILE, lambda d: d[:-1]), "pull a:v1 --to out", BROKEN, "damaged"),
    Case("blob: weights empty", blob(WEIGHTS_FILE, lambda _: b""), "compose a:v1=2 --as c", BROKEN, "damaged"),
    Case("blob: weights longer", blob(WEIGHTS_FILE, lambda d: d + b"\0"), "pull a:v1 --to out", BROKEN, "damaged"),
    Case("blob: weights flipped", blob(WEIGHTS_FILE, flip(-1)), "pull a:v1 --to out", BROKEN, "damaged"),
    Case("blob: weights flipped, composed", blob(WEIGHTS_FILE, flip(-1)), "compose a:v1=2 --as c", BROKEN, "damaged"),
    Case("blob: weights flipped, compared", blob(WEIGHTS_FILE, flip(-1)), "diff a:v1 b:v1", BROKEN, "damaged"),
    Case("blob: header flipped", blob(WEIGHTS_FILE, flip(8)), "compose a:v1=2 --as c", BROKEN, "damaged"),
    Case("blob: length of the header flipped", blob(WEIGHTS_FILE, flip(0)), "diff a:v1 b:v1", BROKEN, "damaged"),
    Case(
        "blob: dtype changed",
        blob(WEIGHTS_FILE, lambda d: d.replace(b"F32", b"I32", 1)),
        "diff a:v1 b:v1",
        BROKEN,
        "damaged",
    ),
    Case(
        "blob: shape changed",
        blob(WEIGHTS_FILE, lambda d: d.replace(b"[2, 6]", b"[6, 2]", 1)),
        "diff a:v1 b:v1",
        BROKEN,
        "damaged",
    ),
    Case(
        "blob: gone",
        lambda home: stored(home, "a@v1", WEIGHTS_FILE).unlink(),
        "pull a:v1 --to out",
        MISSING,
        "not in the store",
    ),
    Case(
        "blob: a link",
        lambda home: instead_of(stored(home, "a@v1", WEIGHTS_FILE), lambda p: p.symlink_to("/etc/passwd")),
        "pull a:v1 --to out",
        BROKEN,
        "expected a regular file",
    ),
    Case(
        "blob: a FIFO",
        lambda home: instead_of(stored(home, "a@v1", WEIGHTS_FILE), os.mkfifo),
        "pull a:v1 --to out",
        BROKEN,
        "not a regular file",
    ),
    Case(
        "blob: a directory",
        lambda home: instead_of(stored(home, "a@v1", CONFIG_FILE), Path.mkdir),
        "show a:v1",
        BROKEN,
        "not a regular file",
    ),
]


def instead_of(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


# --- the tests ----------------------------------------------------------------------------------------------------

CASES = [*HEADERS, *KEYS, *CONFIGS, *LARGE, *SOURCES, *ARGUMENTS, *ALGEBRA]


def ids(cases: list[Case]) -> list[str]:
    return [case.name.encode("ascii", "backslashreplace").decode() for case in cases]


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_bad_input(case, careful_home, monkeypatch, capsys):
    check(case, careful_home, monkeypatch, capsys)


@pytest.mark.parametrize("case", STORES, ids=ids(STORES))
def test_damaged_store(case, home, monkeypatch, capsys):
    check(case, home, monkeypatch, capsys)


def check(case: Case, home: Path, monkeypatch, capsys) -> None:
    case.build(home)
    store = (home / "store").resolve()
    before = contents(home, store)
    code, out, err = run(monkeypatch, capsys, *shlex.split(case.command))
    after = contents(home, store)
    for path in after.keys() - before.keys():
        Path(path).unlink()  # so that one failure is not the next test's
    assert (code, err) == (case.code, err)
    assert after == before
    assert out == ""
    assert err.startswith("loraforge: ")
    assert err.endswith("\n")
    assert err[:-1].isprintable()
    assert case.says in err


# The kind is what a script reads.
KINDS = [
    ("push ./absent x", "not_found", MISSING),
    ("push hf://org/name x", "usage", USAGE),
    ("tag a:v1 B", "bad_reference", USAGE),
    ("tag b:v1 a:v1", "conflict", CONFLICT),
    ("push bad/ x", "bad_format", USAGE),
    ("rerank a:v1 --rank 0 --as c", "cannot_compose", USAGE),
    ("--store a-files push b-files/ x", "bad_store", BROKEN),
    ("pull a:v1 --to /proc/no/such", "io", BROKEN),
    ("no-such-command", "usage", USAGE),
]


@pytest.mark.parametrize(("command", "kind", "code"), KINDS)
@pytest.mark.parametrize("before", [True, False])
def test_errors_as_json(command, kind, code, before, home, monkeypatch, capsys):
    write_adapter(home / "bad", weights=b"<html>")
    arguments = ["--json", *shlex.split(command)] if before else [*shlex.split(command), "--json"]
    found, out, err = run(monkeypatch, capsys, *arguments)
    document = json.loads(out)
    assert (found, err) == (code, "")
    assert set(document) == {"error"}
    assert set(document["error"]) == {"kind", "message"}
    assert document["error"]["kind"] == kind


def test_a_bad_adapter_leaves_no_object_in_a_new_store(home, monkeypatch, capsys):
    write_adapter(home / "bad", settings=config(r=3))
    code, _, _ = run(monkeypatch, capsys, "--store", "new", "push", "bad/", "x")
    assert code == USAGE
    made = home / "new"
    assert [p for p in made.rglob("*") if p.is_file() and p.name != "FORMAT" and p.parent.name != "locks"] == []


def test_a_module_that_a_config_names_is_never_imported(home, monkeypatch, capsys):
    (home / "evil_module.py").write_text("open('ran', 'w').close()\n")
    monkeypatch.syspath_prepend(str(home))
    named = {
        "auto_mapping": {"base_model_class": "Evil", "parent_library": "evil_module"},
        "megatron_core": "evil_module",
        "base_model_name_or_path": "/etc/passwd",
        "revision": "../../..",
    }
    write_adapter(home / "bad", settings=config(**named))
    for command in ("push bad/ x:v1", "show x:v1", "compose x:v1=2 --as y:v1", "pull x:v1 --to out"):
        assert run(monkeypatch, capsys, *shlex.split(command))[0] == 0
    assert "evil_module" not in sys.modules
    assert not (home / "ran").exists()
    assert (home / "out" / CONFIG_FILE).read_bytes() == (home / "bad" / CONFIG_FILE).read_bytes()


def test_a_damaged_ref_or_artifact_is_named_and_the_others_are_listed(home, monkeypatch, capsys):
    rewrite(home / "store/refs/a@v1", lambda _: b"")
    plant(home, canonical.encode(fields_of(home, "b@v1") | {"schema": "loraforge.adapter/2"}), "c@v1")
    code, out, _ = run(monkeypatch, capsys, "ls", "--json")
    problems = {line["name"]: line["problem"] for line in json.loads(out)}
    assert code == 0
    assert "ref a:v1 is damaged" in problems["a"]
    assert problems["b"] is None
    assert "upgrade loraforge" in problems["c"]
    assert run(monkeypatch, capsys, "show", "b:v1")[0] == 0


@pytest.mark.parametrize(("before", "after"), [(b"[4, 6]", b"[6, 4]"), (b'"head.weight": {"dtype": "F32"', b"I32")])
def test_a_saved_module_of_another_shape_or_type_is_damage(before, after, home, monkeypatch, capsys):
    head: Tensors = {f"{PREFIX}head.weight": ("F32", (4, 6), bytes(96))}
    write_adapter(home / "bad", weights=tensors() | head, settings=config(modules_to_save=["head"]))
    assert run(monkeypatch, capsys, "push", "bad/", "saved:v1")[0] == 0
    before = before.replace(b'"head', f'"{PREFIX}head'.encode())
    after = before.replace(b"F32", after) if after == b"I32" else after
    path = stored(home, "saved@v1", WEIGHTS_FILE)
    assert before in path.read_bytes()
    rewrite(path, lambda data: data.replace(before, after))
    code, _, err = run(monkeypatch, capsys, "diff", "saved:v1", "saved:v1")
    assert (code, "damaged" in err) == (BROKEN, True)


def test_strangers_in_the_store_are_passed_over(home, monkeypatch, capsys):
    (home / "store/refs/NOT A REF").write_text("x")
    for area in ("blobs", "manifests"):
        (home / "store" / area / "sha256" / "zz").mkdir()
        (home / "store" / area / "sha256" / "ab" / ("z" * 64)).write_bytes(b"x")
        (home / "store" / area / "sha256" / "ab" / "note.txt").write_bytes(b"x")
    for command in ("ls", "du", "show a:v1", "show sha256:" + stored(home, "a@v1").name[:12]):
        code, _, err = run(monkeypatch, capsys, *shlex.split(command))
        assert (code, err) == (0, ""), command


def test_a_name_given_twice_is_removed_once(home, monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, "rm", "a:v1", "a:v1")
    assert (code, out.count("removed a:v1")) == (0, 1)


def test_the_cache_is_not_written_through_a_link(home, monkeypatch, capsys):
    (home / "store/index.sqlite").unlink(missing_ok=True)
    (home / "store/index.sqlite").symlink_to(home / "outside.sqlite")
    assert run(monkeypatch, capsys, "ls")[0] == 0
    assert not (home / "outside.sqlite").exists()


def lineage(home: Path, generations: int, parents: int) -> None:
    """Artifacts each made from the one before, ``parents`` times over."""
    fields = fields_of(home)
    digest = stored(home, "a@v1").name
    for _ in range(generations):
        source = {"weight": 1.0, "artifact": {"digest": bytes.fromhex(digest), "content_id": bytes(32)}}
        digest = plant(home, canonical.encode(fields | {"derivation": derived({}) | {"inputs": [source] * parents}}))


@pytest.mark.parametrize("command", ["log bad:v1", "show bad:v1", "log bad:v1 --json", "du"])
@pytest.mark.parametrize(("generations", "parents"), [(40, 2), (1500, 1)])
def test_a_long_or_bushy_lineage(command, generations, parents, home, monkeypatch, capsys):
    lineage(home, generations, parents)
    code, out, _ = run(monkeypatch, capsys, *shlex.split(command))
    assert code == 0
    assert len(out) < 10_000_000


# --- the same through a real process ------------------------------------------------------------------------------

COMMAND = [sys.executable, "-m", "loraforge_cli"]


def process(*arguments: str | bytes, **options: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, timeout=3 * CEILING, check=False, **options)


def test_process_says_one_line(home):
    done = process("push", "./absent", "x")
    assert (done.returncode, done.stdout) == (MISSING, b"")
    assert done.stderr.startswith(b"loraforge: absent: no such file")
    assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        [b"show", b"a\xff:v1"],
        [b"compose", b"a:v1=2", b"--base", b"\xff", b"--as", b"c:v1"],
        [b"push", b"./\xff", b"x:v1"],
    ],
)
def test_process_refuses_bytes_that_are_no_text(arguments, home):
    done = process(*arguments)
    assert done.returncode in (USAGE, MISSING)
    assert done.stderr.startswith(b"loraforge: ")
    assert done.stderr.count(b"\n") == 1
    assert done.stdout == b""


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_process_pulls_to_any_path(options, home):
    target = b"out\xff\n"
    done = process("pull", "a:v1", "--to", target, *options, env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"})
    assert (done.returncode, done.stderr) == (0, b"")
    assert (home / os.fsdecode(target) / CONFIG_FILE).exists()
    assert options or done.stdout.count(b"\n") == 1


def test_process_survives_a_full_stdout(home):
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run([*COMMAND, "ls"], stdout=full, stderr=subprocess.PIPE, timeout=60, check=False)
    assert done.returncode == BROKEN
    assert b"Traceback" not in done.stderr
    assert done.stderr.startswith(b"loraforge: ")


def test_process_does_not_wait_for_a_cache_that_is_a_fifo(home):
    (home / "store/index.sqlite").unlink(missing_ok=True)
    os.mkfifo(home / "store/index.sqlite")
    start = time.monotonic()
    done = process("ls", "--json")
    assert done.returncode == 0
    assert time.monotonic() - start < CEILING
    assert [line["problem"] for line in json.loads(done.stdout)] == [None, None]
