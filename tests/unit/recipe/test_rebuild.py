"""Every derived adapter, derived again."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

import loraforge as lf
from loraforge.errors import CompositionError, NotFoundError
from loraforge_registry.config import Settings
from loraforge_registry.digest import Digest
from loraforge_registry.manifest import Derivation, Input
from tests.unit.recipe.adapters import drawn


@pytest.fixture
def store(tmp_path):
    registry = lf.Registry(tmp_path / "store")
    registry.push(drawn(1), "french:v1")
    registry.push(drawn(2, rank=3), "law:v1")
    return registry


def special():
    """Inputs of many kinds: dtypes, rsLoRA, patterns, biases, embeddings, convolutions."""
    g = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    conv = lf.LowRank("conv2d", rand(2, 3, 3, 3), rand(5, 2, 1, 1), alpha=4.0)
    embedding = lf.LowRank("embedding", rand(2, 7), rand(6, 2), alpha=4.0)
    return {
        "bf16": drawn(3, dtype=torch.bfloat16),
        "f64": drawn(4, dtype=torch.float64),
        "rslora": drawn(5, rslora=True),
        "negative": replace(drawn(6), targets={n: replace(p, alpha=-p.alpha) for n, p in drawn(6).targets.items()}),
        "others": lf.Adapter({"model.conv": conv, "model.embed_tokens": embedding}, Settings(base_name="some/base")),
    }


OPERATIONS = {
    "linear": lambda f, g: lf.linear([(f, 0.7), (g, -1.3)]),
    "linear of one": lambda f, _: lf.linear([(f, 2.5)]),
    "itself": lambda f, _: lf.linear([(f, 1.0)]),
    "with a base": lambda f, g: lf.linear([(f, 0.5), (g, 0.5)], base="other/name"),
    "without saved": lambda f, g: lf.linear([(f, 0.5), (g, 0.4)], drop_saved=True),
    "stack": lambda f, g: lf.stack([f, g, f]),
    "what cancels": lambda f, g: lf.linear([(f, 1.0), (g, 1.0), (f, -1.0)]),
    "rank": lambda f, g: lf.rerank(lf.stack([f, g]), rank=2),
    "energy": lambda f, g: lf.rerank(lf.stack([f, g]), energy=0.9, min_rank=2, max_rank=3),
    "budget": lambda f, g: lf.rerank(lf.stack([f, g]), max_parameters=400),
    "select": lambda f, _: lf.select(f, include=["q_proj"], exclude=r".*\.0\..*"),
    "gradient": lambda f, g: lf.linear([(lf.select(f, gradient=[0.25, 1]), 0.5), (g, 1)]),
    "deep": lambda f, g: lf.rerank(
        lf.linear([(lf.rerank(f, rank=1).adapter, 2), (lf.select(g, exclude="attention"), 1)]), 2
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_was_derived_comes_out_the_same(name, store):
    made = OPERATIONS[name](store.load("french:v1"), store.load("law:v1"))
    store.push(made, "made:v1")
    found = lf.rebuild("made:v1", store)
    adapter = getattr(made, "adapter", made)
    assert found.same
    assert found.found == found.expected == lf.content_id(adapter)
    assert found.distance == 0


@pytest.mark.parametrize("name", special())
def test_inputs_of_every_kind(name, store):
    store.push(special()[name], "odd:v1")
    odd = store.load("odd:v1")
    store.push(lf.rerank(lf.linear([(odd, 0.3)]), rank=1), "made:v1")
    assert lf.rebuild("made:v1", store).same


def test_inputs_that_are_not_stored_are_named_and_can_be_brought(store, tmp_path):
    lf.save(drawn(7), tmp_path / "seven")
    blend = lf.linear([(lf.load(tmp_path / "seven"), 0.5), (store.load("french:v1"), 1.0)])
    store.push(blend, "made:v1")
    with pytest.raises(NotFoundError, match=f"content {lf.content_id(drawn(7))} is not in the store; pull it"):
        lf.rebuild("made:v1", store)
    assert lf.rebuild("made:v1", store, sources=[tmp_path / "seven"]).same
    assert lf.rebuild("made:v1", store, sources=[drawn(7)]).same
    store.push(tmp_path / "seven")  # whatever its name: it is known by what it computes
    assert lf.rebuild("made:v1", store).same


def test_all_that_is_missing_is_said_at_once(store, tmp_path):
    store.push(lf.linear([(drawn(7), 0.5), (drawn(8), 1.0)]), "made:v1")
    with pytest.raises(NotFoundError) as error:
        lf.rebuild("made:v1", store)
    assert str(error.value).count("is not in the store") == 2


def test_what_differs_says_how_far(store):
    """A manifest that claims another derivation than its weights have, at a known distance."""
    french = store.load("french:v1")
    true = lf.linear([(french, 0.5)])
    store.push(replace(lf.linear([(french, 0.55)]), derivation=true.derivation), "untrue:v1")
    found = lf.rebuild("untrue:v1", store)
    assert not found.same
    assert found.distance == pytest.approx(0.05 / 0.55, rel=1e-6)
    last_bit = {n: replace(p, a=torch.nextafter(p.a, torch.tensor(9.0))) for n, p in true.targets.items()}
    store.push(replace(true, targets=last_bit), "rounded:v1")
    assert 0 < lf.rebuild("rounded:v1", store).distance < 1e-6


def test_what_no_algebra_repeats(store):
    with pytest.raises(CompositionError, match="was not derived"):
        lf.rebuild("french:v1", store)
    store.push(replace(drawn(3), derivation=Derivation("train", 1, (), {"lr": 0.1})), "trained:v1")
    with pytest.raises(CompositionError, match="it was trained"):
        lf.rebuild("trained:v1", store)
    store.push(lf.rerank(store.load("trained:v1"), rank=1), "small:v1")
    assert lf.rebuild("small:v1", store).same


@pytest.mark.parametrize(
    ("derivation", "says"),
    [
        (("melt", 1, {}), "no operation 'melt 1'"),
        (("linear", 7, {}), "no operation 'linear 7'"),
        (("rerank", 1, {"rank": "2"}), "rank is '2', expected a whole number"),
        (("rerank", 1, {"rank": True}), "expected a whole number"),
        (("rerank", 1, {"rnak": 2}), "did you mean 'rank'"),
        (("select", 1, {"gradient": ["x"]}), "expected a list of numbers"),
        (("select", 1, {"include": [1]}), "expected a list of names"),
        (("extract", 2, {}), "extract 2"),
        (("extract", 1, {"rank": "2"}), "rank is '2'"),
    ],
)
def test_a_strangers_manifest_is_refused_in_a_sentence(derivation, says, store):
    operation, version, parameters = derivation
    inputs = (Input(Digest.parse("sha256:" + "0" * 64)),) if operation == "extract" else ()
    inputs = inputs or lf.linear([(store.load("french:v1"), 1.0)]).derivation.inputs
    store.push(replace(drawn(3), derivation=Derivation(operation, version, inputs, parameters)), "odd:v1")
    with pytest.raises(CompositionError, match=says):
        lf.rebuild("odd:v1", store, checkpoints=("a", "b"))


def test_what_was_extracted_needs_its_checkpoints(store, tmp_path):
    g = torch.Generator().manual_seed(1)
    base = {f"model.layers.{n}.q.weight": torch.randn(12, 8, generator=g) for n in range(2)}
    base["model.norm.weight"] = torch.ones(8)
    tuned = {
        n: w + 1 if w.dim() == 1 else w + torch.randn(12, 2, generator=g) @ torch.randn(2, 8, generator=g)
        for n, w in base.items()
    }
    for name, weights in (("base", base), ("tuned", tuned), ("other", {n: w + 1 for n, w in base.items()})):
        (tmp_path / name).mkdir()
        save_file(weights, tmp_path / name / "model.safetensors")
    extracted = lf.extract(tmp_path / "base", tmp_path / "tuned", rank=2, base_name="some/base", drop=["norm"])
    store.push(extracted.adapter, "x:v1")
    checkpoints = (tmp_path / "base", tmp_path / "tuned")
    assert lf.rebuild("x:v1", store, checkpoints=checkpoints).same
    with pytest.raises(NotFoundError, match="it was extracted from two checkpoints"):
        lf.rebuild("x:v1", store)
    with pytest.raises(CompositionError, match="these are not the checkpoints"):
        lf.rebuild("x:v1", store, checkpoints=(tmp_path / "base", tmp_path / "other"))
    store.push(lf.rerank(store.load("x:v1"), rank=1), "small:v1")
    assert lf.rebuild("small:v1", store).same
    store.push(lf.rerank(extracted.adapter, rank=1), "at-once:v1")  # the extraction itself was never stored
    assert lf.rebuild("at-once:v1", store, checkpoints=checkpoints).same
