"""Tied embeddings: when a base ties them, and which adapters may then be merged."""

import json

import pytest
import torch

import loraforge as lf
from loraforge.adapter import Adapter, LowRank
from loraforge.checkpoint.reader import open_checkpoint
from loraforge.checkpoint.ties import written_once
from loraforge.errors import CompositionError, FormatError
from loraforge_registry.config import Settings
from tests.checkpoints import normal, read_tensors, write_base

EMBED, HEAD, Q = "model.embed_tokens", "lm_head", "model.layers.0.q"


def base_of(folder, config, *, head=False):
    tensors = {f"{EMBED}.weight": normal(12, 6, seed=1), f"{Q}.weight": normal(5, 6, seed=2)}
    return write_base(
        folder, tensors | ({f"{HEAD}.weight": tensors[f"{EMBED}.weight"].clone()} if head else {}), config
    )


def embedding(scale=1.0):
    return LowRank("embedding", normal(2, 12, seed=3), normal(6, 2, seed=4), 2 * scale)


def twin(pair):
    """The same update of the linear layer that shares the weight."""
    return LowRank("linear", pair.b.T.contiguous(), pair.a.T.contiguous(), pair.alpha)


def linear():
    return LowRank("linear", normal(2, 6, seed=5), normal(5, 2, seed=6), 2.0)


def once(folder, adapter):
    with open_checkpoint(folder) as checkpoint:
        return written_once(checkpoint, adapter, "a")


TIED = [{"tie_word_embeddings": True}, {"text_config": {"tie_word_embeddings": True}}, {}]
UNTIED = [{"tie_word_embeddings": False}, {"text_config": {"tie_word_embeddings": False}}]
ONE_SIDED = {
    "embedding": Adapter({EMBED: embedding(), Q: linear()}),
    "head": Adapter({HEAD: twin(embedding()), Q: linear()}),
    "saved embedding": Adapter({Q: linear()}, extras={f"{EMBED}.weight": normal(12, 6)}),
    "saved head": Adapter({Q: linear()}, extras={f"{HEAD}.weight": normal(12, 6)}),
    "different": Adapter({EMBED: embedding(), HEAD: twin(embedding(2.0))}),
    "saved differently": Adapter(
        {}, extras={f"{EMBED}.weight": normal(12, 6), f"{HEAD}.weight": normal(12, 6, seed=9)}
    ),
    "each in its way": Adapter({EMBED: embedding()}, extras={f"{HEAD}.weight": normal(12, 6)}),
}


@pytest.mark.parametrize("config", TIED, ids=str)
@pytest.mark.parametrize("name", ONE_SIDED)
def test_a_tied_base_refuses_what_changes_one_of_two(config, name, tmp_path):
    with pytest.raises(CompositionError, match=r"^a changes '(model.embed_tokens|lm_head)'.*untie the base first"):
        once(base_of(tmp_path, config), ONE_SIDED[name])


@pytest.mark.parametrize("config", UNTIED, ids=str)
@pytest.mark.parametrize("name", ONE_SIDED)
def test_an_untied_base_takes_it(config, name, tmp_path):
    assert once(base_of(tmp_path, config, head=True), ONE_SIDED[name]) is ONE_SIDED[name]


def test_where_the_config_does_not_say_a_stored_head_means_untied(tmp_path):
    assert once(base_of(tmp_path, {}, head=True), ONE_SIDED["embedding"]) is ONE_SIDED["embedding"]


def test_a_config_of_the_text_model_does_not_overrule_the_whole(tmp_path):
    folder = base_of(tmp_path, {"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}})
    assert once(folder, ONE_SIDED["embedding"]) is ONE_SIDED["embedding"]


def test_no_config_means_no_ties(tmp_path):
    folder = base_of(tmp_path, {})
    (folder / "config.json").unlink()
    assert once(folder, ONE_SIDED["embedding"]) is ONE_SIDED["embedding"]


@pytest.mark.parametrize("config", TIED, ids=str)
def test_others_are_left_alone(config, tmp_path):
    adapter = Adapter({Q: linear()})
    assert once(base_of(tmp_path, config), adapter) is adapter


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("kind", ["targets", "extras"])
def test_both_alike_are_written_once(head, kind, tmp_path):
    pair, whole = embedding(), normal(12, 6, seed=7)
    both = {
        "targets": Adapter({EMBED: pair, HEAD: twin(pair), Q: linear()}),
        "extras": Adapter({Q: linear()}, extras={f"{EMBED}.weight": whole, f"{HEAD}.weight": whole.clone()}),
    }[kind]
    base = base_of(tmp_path / "base", {"tie_word_embeddings": True}, head=head)
    found = once(base, both)
    names = {*found.targets, *(key.removesuffix(".weight") for key in found.extras)}
    assert names == ({EMBED, HEAD, Q} if head else {EMBED, Q})
    lf.merge(base, both, tmp_path / "merged")
    before, after = read_tensors(base), read_tensors(tmp_path / "merged")
    expected = whole if kind == "extras" else (before[f"{EMBED}.weight"].double() + pair.delta()).float()
    for name in [EMBED, HEAD][: 1 + head]:
        assert torch.equal(after[f"{name}.weight"], expected)


def test_token_rows_are_meant_for_both(tmp_path):
    """PEFT ties these itself."""
    settings = Settings(token_indices={"": (3, 7)})
    adapter = Adapter({Q: linear()}, settings, {f"{EMBED}.token_adapter.trainable_tokens_delta": normal(2, 6, seed=7)})
    assert once(base_of(tmp_path, {"tie_word_embeddings": True}), adapter) is adapter


@pytest.mark.parametrize("text", ["[]", '"x"', "3"])
def test_a_config_that_is_no_object_says_nothing(text, tmp_path):
    folder = base_of(tmp_path, {})
    (folder / "config.json").write_text(text)
    assert once(folder, ONE_SIDED["embedding"]) is ONE_SIDED["embedding"]


@pytest.mark.parametrize("text", ["", "{", '{"a": NaN}', "{" * 90, '{"a": 1, "a": 2}'])
def test_a_config_that_cannot_be_read(text, tmp_path):
    folder = base_of(tmp_path, {})
    (folder / "config.json").write_text(text)
    with pytest.raises(FormatError):
        once(folder, ONE_SIDED["embedding"])


def test_a_config_that_cannot_be_read_is_named(tmp_path):
    folder = base_of(tmp_path, {})
    (folder / "config.json").write_text("{")
    with pytest.raises(FormatError, match=r"config\.json"):
        once(folder, ONE_SIDED["embedding"])


def test_the_config_is_not_read_where_it_does_not_matter(tmp_path):
    folder = base_of(tmp_path, {})
    (folder / "config.json").write_text(json.dumps([]) + "garbage")
    adapter = Adapter({Q: linear()})
    assert once(folder, adapter) is adapter
