"""adapter_config.json: any bytes give a config or one error, and writing is a fixed point of reading."""

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from loraforge_registry.config import AdapterConfig, encode_config, parse_config
from loraforge_registry.errors import ConfigError, KeyMismatchError
from loraforge_registry.header import TensorEntry
from loraforge_registry.layout import read_layout
from tests.bad_files import config, tensors
from tests.strategies import good_configs, mutated, random_configs

FEW = settings(max_examples=200)
MANY = settings(max_examples=500)


def parsed(data: bytes) -> AdapterConfig | None:
    try:
        return parse_config(data)
    except ConfigError:
        return None


@MANY
@given(random_configs | mutated(good_configs) | st.binary(max_size=40))
@example(b'{"peft_type": "LORA", "r": 1e400}')
@example(b'{"peft_type": "LORA", "lora_alpha": ' + b"9" * 4000 + b"}")
def test_any_bytes_give_a_config_or_one_error(data):
    parsed(data)


@FEW
@given(good_configs)
def test_writing_is_a_fixed_point_of_reading(data):
    once = encode_config(parse_config(data))
    assert encode_config(parse_config(once)) == once


@FEW
@given(random_configs | mutated(good_configs))
def test_whatever_is_read_can_be_written_and_read(data):
    found = parsed(data)
    if found is not None:
        written = encode_config(found)
        assert encode_config(parse_config(written)) == written


@FEW
@given(good_configs)
def test_writing_keeps_what_the_config_says(data):
    found = parse_config(data)
    again = parse_config(encode_config(found))
    assert again.scaling == found.scaling
    assert again.settings.modules_to_save == found.settings.modules_to_save
    assert again.settings.base_mutating_init == found.settings.base_mutating_init
    for field in ("target_modules", "exclude_modules", "token_indices", "layers_pattern"):
        assert (getattr(again.settings, field) or None) == (getattr(found.settings, field) or None)


@FEW
@given(random_configs | good_configs)
def test_any_config_and_tensors_give_a_layout_or_one_error(data):
    entries = [TensorEntry(name, dtype, tuple(shape), 0, 0) for name, (dtype, shape, _) in tensors().items()]
    found = parsed(data)
    if found is not None:
        try:
            layout = read_layout(found, entries)
        except (ConfigError, KeyMismatchError):
            return
        assert sorted(layout.targets) == ["model.layers.0.q", "model.layers.0.v"]


@FEW
@given(st.text(max_size=30), st.sampled_from(["target_modules", "exclude_modules", "layers_pattern", "rank_pattern"]))
@example("layers|x", "layers_pattern")
@example("(", "target_modules")
@example("(?P<a>x)(?P<a>y)", "exclude_modules")
@example("(?(1)a|b)", "rank_pattern")
@example("(q)?", "rank_pattern")
def test_any_pattern_gives_a_layout_or_one_error(pattern, key):
    value = {pattern: 2} if key == "rank_pattern" else pattern
    fields = config() | {key: value} | ({"layers_to_transform": [0]} if key == "layers_pattern" else {})
    entries = [TensorEntry(name, dtype, tuple(shape), 0, 0) for name, (dtype, shape, _) in tensors().items()]
    try:
        read_layout(parse_config(json.dumps(fields).encode()), entries)
    except (ConfigError, KeyMismatchError):
        return


shapes = st.lists(st.integers(0, 6), max_size=5)


@MANY
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["model.layers.0.q", "v", "", "embed_tokens"]),
            st.sampled_from(
                [".lora_A.weight", ".lora_B.weight", ".lora_B.bias", ".lora_embedding_A", ".lora_embedding_B",
                 ".lora_magnitude_vector", ".token_adapter.trainable_tokens_delta", ".weight", ".bias",
                 ".base_layer.weight"]
            ),
            shapes,
            st.sampled_from(["F32", "BF16", "I64"]),
        ),
        max_size=6,
        unique_by=lambda row: row[:2],
    ),
    good_configs | st.just(json.dumps(config()).encode()),
)  # fmt: skip
@example([("q", ".lora_embedding_A", [], "F32"), ("q", ".lora_embedding_B", [], "F32")], json.dumps(config()).encode())
def test_any_keys_and_shapes_give_a_layout_or_one_error(rows, data):
    entries = [TensorEntry(f"base_model.model.{target}{role}", dtype, tuple(shape), 0, 0)
               for target, role, shape, dtype in rows]  # fmt: skip
    try:
        layout = read_layout(parse_config(data), entries)
    except (ConfigError, KeyMismatchError):
        return
    for target in layout.targets.values():
        assert target.rank >= 1
        assert all(dimension >= 1 for dimension in target.shape)


@pytest.mark.parametrize("value", [None, False, [], 0, ""])
def test_an_unknown_setting_that_is_switched_off_is_no_matter(value):
    fields = config() | {"unheard_of": value, "use_bdlora": value}
    assert parse_config(json.dumps(fields).encode()) == parse_config(json.dumps(config()).encode())
