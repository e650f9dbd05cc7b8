"""The fuzz targets: for each reader of strangers' bytes, what judges it, and what changes its input."""

import json
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from loraforge_registry import canonical, hub_record
from loraforge_registry.digest import Digest
from loraforge_registry.errors import FormatError
from loraforge_registry.trees import TreeRecord, encode_tree
from tests.fuzz import bundles, mutators, patterns, readers
from tests.fuzz.mutators import Mutator, Token, json_mutator, msgpack_mutator, words

DIGITS = b"0123456789abcdef" * 4
REF_WORDS = [b"sha256:", b"blake3:", b"sha256:" + DIGITS, DIGITS, b"-", b" ", b"\n", b"\r\n", b"v1", b"latest", b"%20",
             b"%", b"0", b"00000000", b"1700000000", b"L", b"R", b"_", b"+1", b"1_0", b"tag", b"\xff"]  # fmt: skip
NAME_WORDS = [b"sha256:", b"blake3:", b"sha256:" + DIGITS, b"sha256:" + DIGITS[:8], DIGITS, b"sha256", b"@", b":",
              b"@sha256:", b"..", b".", b"-", b"_", b".lock", b"/", b"\\", b"latest", b"\n", b"\0", b"A", b"\xc3\xa9",
              b"\xe2\x80\xae", b"a" * 127, b"a" * 64, b"~", b"a@sha256:" + DIGITS[:12]]  # fmt: skip
PATTERN_WORDS = [word.encode() for word in (
    ".*", ".+", r"\.", "(", ")", "(?:", "|", "[", "]", "[^.]", "a", "q", "_proj", "*", "+", "?", "{2}", "{1,3}", "{,2}",
    "{", "{e}", "}", r"\d", r"\w", r"\b", r"\s", "^", "$", r"\Z", r"\A", "(?i)", "(?x)", "(?s)", "(?P<n>", "(?P=n)",
    r"\1", "(?=", "(?!", "(?<=", "(?<!", "(?>", "*+", "++", "??", "*?", "layers", "model", "mlp|attn", "\n", "(a+)+",
    "[[:alpha:]]", "[a--b]", r"\p{L}", r"\X", r"\K", "(?r)", "(?b)", "(?#x)", "(?(1)a|b)", r"\N{DIGIT ONE}", r"\x41",
    r"\u0041", "[]a]", "[a-z]", r"[\w]", ",", "L", "T", "C", "F", "h", "q_proj", "model.layers.0.self_attn.q_proj",
)]  # fmt: skip
CONFIG_KEYS = ["peft_type", "r", "lora_alpha", "target_modules", "exclude_modules", "rank_pattern", "bias",
               "alpha_pattern", "layers_pattern", "layers_to_transform", "modules_to_save", "trainable_token_indices",
               "use_dora", "revision", "use_rslora", "lora_bias", "fan_in_fan_out", "ensure_weight_tying",
               "init_lora_weights", "task_type", "base_model_name_or_path", "auto_mapping", "layer_replication",
               "megatron_core", "unheard_of", ""]  # fmt: skip
CONFIG_LEAVES = [*mutators.JSON_LEAVES, "LORA", "q", "v", "all-linear", "none", "all", "lora_only", "pissa", "olora",
                 "pissa_niter_4", "gaussian", "loftq", *map(Token, ("1e-12", "1e12", "1000000", "2147483648")),
                 ["q", "v"], [Token("1"), Token("0")]]  # fmt: skip
RECORD = msgpack_mutator(mutators.RECORD_KEYS)
JSON = json_mutator(mutators.JSON_LEAVES, ["", "a", "\ud800"])
CONFIG = json_mutator(CONFIG_LEAVES, CONFIG_KEYS)
HUB_KEYS = [
    *mutators.RECORD_KEYS,
    "manifest",
    "parents",
    "git",
    "dtype",
    "data_offsets",
    "adapter_config.json",
    "README.md",
    "nodes",
    "q/v",
]
HUB = json_mutator([*mutators.JSON_LEAVES, f"sha256:{'0' * 64}", f"blake3:{'0' * 64}", "F32", "0" * 40], HUB_KEYS)


def _hub_mutator(described: Callable[[dict[str, Any]], bytes]) -> Mutator:
    """Change a loraforge.json; mostly it names what it describes afterwards."""

    def mutate(data: bytes, generator: random.Random, blindly: mutators.Blindly) -> bytes:
        changed = HUB(data, generator, blindly)
        try:
            fields = json.loads(changed)
            digest = Digest.of(described(fields))
        except (FormatError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
            return changed
        if generator.random() < 0.2:
            return changed
        return json.dumps({**fields, "digest": str(digest)}).encode()

    return mutate


def _tree_of(fields: dict[str, Any]) -> bytes:
    nodes = {path: Digest.parse(digest) for path, digest in fields["nodes"].items()}
    return encode_tree(TreeRecord(Digest.parse(fields["base"]["digest"]), fields["base"]["name"], nodes))


@dataclass(frozen=True)
class Target:
    """A reader: what judges it, what changes its input, how long that gets, and the modules that it is in."""

    check: Callable[[bytes], str]
    mutate: Mutator
    longest: int
    modules: tuple[str, ...]


def _with_checksums(data: bytes) -> bytes:
    """Give each line of a reflog the checksum that it should have."""
    if data[:1] != b"L":
        return data
    lines = [line.partition(b" ")[2] or line for line in data[1:].split(b"\n")]
    return b"L" + b"\n".join(b"%08x %s" % (zlib.crc32(line), line) if line else b"" for line in lines)


TARGETS: dict[str, Target] = {
    "header": Target(readers.header, mutators.header, 4096, ("header",)),
    "codec": Target(readers.codec, msgpack_mutator(["", "a", "b", "é", 1, None, b"a"]), 1024, ("canonical",)),
    "record": Target(readers.record, RECORD, 2048, ("manifest", "trees", "fields")),
    "hub": Target(
        readers.hub,
        _hub_mutator(lambda fields: canonical.encode(hub_record._manifest(fields))),
        4096,
        ("hub_record",),
    ),
    "hub_tree": Target(readers.hub_tree, _hub_mutator(_tree_of), 2048, ("hub_tree_record",)),
    "ref": Target(readers.ref, words(REF_WORDS, finish=_with_checksums), 1024, ("refs",)),
    "names": Target(readers.names, words(NAME_WORDS), 256, ("names", "digest")),
    "strict_json": Target(readers.strict, JSON, 4096, ("strict_json",)),
    "config": Target(readers.config, CONFIG, 4096, ("config",)),
    "pattern": Target(patterns.pattern, words(PATTERN_WORDS), 200, ("patterns",)),
    "bundle": Target(bundles.bundle, bundles.mutator(CONFIG), 8192, ("bundle",)),
}
