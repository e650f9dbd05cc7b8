"""Which tensor a target means: each rule of the spelling, and that no two mean one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraforge.checkpoint.homes import PREFIXES, find_homes
from loraforge.errors import CompositionError

KEYS = ["layers.0.q.weight", "layers.0.v.weight"]


def put(prefix, names=KEYS):
    return [prefix + name for name in names]


def test_as_it_is():
    assert find_homes(KEYS, {*KEYS, "other"}, "a") == dict(zip(KEYS, KEYS, strict=True))


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_in_front_of_the_targets(prefix):
    keys = put(prefix)
    assert find_homes(keys, set(KEYS), "a") == dict(zip(keys, KEYS, strict=True))


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_in_front_of_the_base(prefix):
    assert find_homes(KEYS, set(put(prefix)), "a") == dict(zip(KEYS, put(prefix), strict=True))


@pytest.mark.parametrize("prefix", PREFIXES)
def test_as_it_is_comes_first(prefix):
    """A base that has both spellings (a wrapper around its own decoder) gives the target's own."""
    found = find_homes(KEYS, {*KEYS, *put(prefix)}, "a")
    assert list(found.values()) == KEYS


def test_a_prefix_may_stand_before_some_targets_only():
    """``model.layers...`` and ``lm_head``, on a base without ``model.``."""
    keys = ["model.layers.0.q.weight", "lm_head.weight"]
    found = find_homes(keys, {"layers.0.q.weight", "lm_head.weight"}, "a")
    assert list(found.values()) == ["layers.0.q.weight", "lm_head.weight"]


def test_one_spelling_is_for_all_of_them():
    with pytest.raises(CompositionError, match=r"1 of 2 keys have no tensor in the base, 'y.weight' the first"):
        find_homes(["x.weight", "y.weight"], {"x.weight", "model.y.weight"}, "a")


def test_prefixes_are_not_taken_off_twice():
    with pytest.raises(CompositionError, match="no tensor in the base"):
        find_homes(["model.model.x.weight"], {"x.weight"}, "a")


def test_says_what_is_missing_and_what_is_near():
    keys = put("encoder.", ["layers.0.q.weight", *(f"layers.{i}.k.weight" for i in range(9))])
    with pytest.raises(CompositionError) as stop:
        find_homes(keys, {"decoder.layers.0.q.weight"}, "french")
    text = str(stop.value)
    assert text.startswith("french: 10 of 10 keys have no tensor in the base, 'encoder.layers.0.q.weight'")
    assert "the base has 'decoder.layers.0.q.weight'" in text
    assert "'encoder.layers.2.k.weight'" not in text
    assert len(text) < 300


def test_two_that_mean_one_are_refused():
    with pytest.raises(
        CompositionError, match=r"'model.x.weight' and 'x.weight' both mean the base's tensor 'x.weight'"
    ):
        find_homes(["model.x.weight", "x.weight"], {"x.weight"}, "a")


def test_nothing_is_asked_for():
    assert find_homes([], {"x"}, "a") == {}


names = st.lists(st.sampled_from("ab"), min_size=1, max_size=2).map(".".join)
spelt = st.builds(lambda prefix, name: f"{prefix}{name}.weight", st.sampled_from(["", *PREFIXES]), names)


@given(st.lists(spelt, unique=True, max_size=5), st.sets(spelt, max_size=8))
def test_every_answer_is_injective_and_of_the_base(keys, tensors):
    try:
        found = find_homes(keys, tensors, "a")
    except CompositionError:
        assert not set(keys) <= tensors
        return
    assert list(found) == keys
    assert len(set(found.values())) == len(keys)
    assert set(found.values()) <= tensors
    for key, name in found.items():
        assert key == name or any(key == prefix + name or name == prefix + key for prefix in PREFIXES)
