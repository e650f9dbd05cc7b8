"""What hypothesis draws: values of the formats, and damage to their bytes."""

import json
from collections.abc import Mapping

from hypothesis import strategies as st

from loraforge_registry.digest import Digest
from loraforge_registry.header import BITS, TensorEntry
from loraforge_registry.manifest import (
    CONFIG_FILE,
    README_FILE,
    WEIGHTS_FILE,
    Artifact,
    Derivation,
    File,
    Input,
    Manifest,
    Tensor,
)

# Every str that UTF-8 can spell.
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
floats = st.floats(allow_nan=False, allow_infinity=False).map(lambda number: number + 0.0)  # + 0.0: no -0.0
scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | floats | texts
values = st.recursive(
    scalars | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)
"""What canonical msgpack holds."""

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)


@st.composite
def mutated(draw: st.DrawFn, whole: st.SearchStrategy[bytes]) -> bytes:
    """Good bytes with up to three of: a byte changed, a stretch removed, doubled or replaced, something inserted."""
    data = bytearray(draw(whole))
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(data)))
        stretch = data[start : start + draw(st.integers(1, 12))]
        other = draw(st.sampled_from([b"", b"\0", b" ", b"0", b"9", b"-", b'"', b",", b"\xff", b"[", b"{", b"}"]))
        data[start : start + draw(st.sampled_from([0, 1, len(stretch)]))] = draw(
            st.sampled_from([bytes(stretch) * 2, other, draw(st.binary(max_size=3))])
        )
    return bytes(data)


def _digests(algorithm: str) -> st.SearchStrategy[Digest]:
    return st.binary(min_size=32, max_size=32).map(lambda raw: Digest.from_raw(algorithm, raw))


sha256 = _digests("sha256")
blake3 = _digests("blake3")
artifacts = st.builds(Artifact, sha256, sha256)


def _derivations(source: st.SearchStrategy[object]) -> st.SearchStrategy[Derivation]:
    return st.builds(
        Derivation,
        operation=texts,
        version=st.integers(0, 2**53),
        inputs=st.lists(st.builds(Input, source, floats), max_size=3).map(tuple),
        parameters=st.dictionaries(texts, scalars | st.lists(scalars, max_size=3), max_size=3),
    )


derivations = _derivations(sha256 | artifacts | _derivations(sha256 | artifacts))


# Numbers by target, and a few facts about all: "error", where there is one, is a float.
_rows = st.fixed_dictionaries({"error": floats}) | st.dictionaries(texts.filter(lambda key: key != "error"), scalars)
reports = st.builds(
    lambda facts, targets: {**facts, **({"targets": targets} if targets else {})},
    st.dictionaries(texts.filter(lambda key: key not in ("error", "targets")), scalars, max_size=3),
    st.dictionaries(texts, _rows, max_size=3),
)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    sizes = st.integers(0, 2**53)
    paths = draw(st.sampled_from([(CONFIG_FILE, WEIGHTS_FILE), (README_FILE, CONFIG_FILE, WEIGHTS_FILE)]))
    entries = draw(
        st.lists(
            st.builds(
                TensorEntry,
                texts,
                st.sampled_from(list(BITS)),
                st.lists(sizes, max_size=3).map(tuple),
                sizes,
                sizes,
            ),
            max_size=4,
            unique_by=lambda entry: entry.name,
        )
    )
    return Manifest(
        content_id=draw(sha256),
        files=tuple(File(path, draw(sha256), draw(sizes)) for path in paths),
        tensors=tuple(Tensor(entry, draw(blake3)) for entry in sorted(entries, key=lambda entry: entry.name)),
        base_name=draw(st.none() | texts),
        base_revision=draw(st.none() | texts),
        derivation=draw(st.none() | derivations),
        report=draw(st.none() | reports),
    )


@st.composite
def safetensors_files(draw: st.DrawFn) -> bytes:
    """Well-formed files: any dtypes, shapes with zeros, any order of entries, metadata or none, padding."""
    names = draw(st.lists(st.text("abc._é", min_size=1, max_size=6), max_size=4, unique=True))
    fields: dict[str, object] = {}
    position = 0
    for name in names:
        dtype = draw(st.sampled_from([dtype for dtype, bits in BITS.items() if bits >= 8]))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        end = position + _product(shape) * BITS[dtype] // 8
        fields[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        position = end
    order = draw(st.permutations(names))
    metadata = draw(st.none() | st.dictionaries(texts, texts, max_size=2))
    document = ({} if metadata is None else {"__metadata__": metadata}) | {name: fields[name] for name in order}
    text = json.dumps(document, ensure_ascii=draw(st.booleans())).encode() + b" " * draw(st.integers(0, 8))
    return len(text).to_bytes(8, "little") + text + draw(st.binary(min_size=position, max_size=position))


def _product(numbers: list[int]) -> int:
    result = 1
    for number in numbers:
        result *= number
    return result


_name = st.text("abqv.", min_size=1, max_size=4)
_names = st.lists(_name, max_size=3)
_positive = st.integers(1, 2**20)
_rows = st.lists(_positive, min_size=1, max_size=3)
_alphas = st.floats(1e-12, 1e12) | st.floats(-1e12, -1e-12) | _positive
_GOOD: dict[str, st.SearchStrategy[object]] = {
    "alpha_pattern": st.dictionaries(texts, _alphas, max_size=2),
    "base_model_name_or_path": texts,
    "bias": st.sampled_from(["none", "all", "lora_only"]),
    "ensure_weight_tying": st.booleans(),
    "exclude_modules": _names | texts,
    "fan_in_fan_out": st.booleans(),
    "init_lora_weights": st.booleans() | st.sampled_from(["pissa", "olora", "gaussian", "pissa_niter_4"]),
    "layers_pattern": _names | texts,
    "layers_to_transform": st.integers(0, 40) | st.lists(st.integers(0, 40), max_size=3),
    "lora_alpha": _alphas,
    "lora_bias": st.booleans(),
    "modules_to_save": _names,
    "r": st.integers(1, 1_000_000),
    "rank_pattern": st.dictionaries(texts, st.integers(1, 1_000_000), max_size=2),
    "revision": texts,
    "target_modules": _names | texts,
    "task_type": texts,
    "trainable_token_indices": st.dictionaries(_name, _rows, max_size=2) | _rows,
    "use_dora": st.booleans(),
    "use_rslora": st.booleans(),
}


def _as_bytes(draw_fields: st.SearchStrategy[dict[str, object]]) -> st.SearchStrategy[bytes]:
    return draw_fields.map(lambda fields: json.dumps(fields).encode())


def _objects(optional: Mapping[str, st.SearchStrategy[object]]) -> st.SearchStrategy[bytes]:
    return _as_bytes(st.fixed_dictionaries({"peft_type": st.just("LORA")}, optional=optional))


_NEVER_NULL = ("r", "lora_alpha", "init_lora_weights")
_OTHERS = ("auto_mapping", "inference_mode", "layer_replication", "target_parameters", "use_bdlora", "unheard_of")
good_configs = _objects({key: good if key in _NEVER_NULL else st.none() | good for key, good in _GOOD.items()})
random_configs = _objects(dict.fromkeys([*_GOOD, *_OTHERS], json_values)) | _as_bytes(
    st.dictionaries(texts, json_values, max_size=4)
)
