"""What a recipe makes, and when it makes it again."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import loraforge as lf
from loraforge.compose._select import interpolated
from loraforge.errors import CompositionError, NotFoundError, RecipeError
from loraforge_registry.digest import Digest
from tests.unit.recipe.adapters import SHAPES, dense, distance, drawn

BLEND = """\
recipe: 1
inputs: {french: french:v1, law: law:v1}
steps:
  sum:
    from: [{adapter: french, weight: 0.7}, {adapter: law, weight: 0.3}]
  part:
    method: select
    from: sum
    include: [q_proj]
  small: {method: rerank, from: part, rank: 2}
result: small
"""


@pytest.fixture
def store(tmp_path):
    registry = lf.Registry(tmp_path / "store")
    registry.push(drawn(1), "french:v1")
    registry.push(drawn(2, rank=3), "law:v1")
    return registry


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "blend.yaml").write_text(BLEND)
    return tmp_path / "blend.yaml"


def lock_of(recipe):
    return json.loads(recipe.with_suffix(".lock").read_text())["inputs"]


def found(made):
    return {step.name: step.found for step in made.steps}


# ---- what comes out

weights = st.floats(-2, 2).map(lambda x: round(x, 3))
filters = st.sampled_from(
    [None, ["q_proj"], ["layers.1.mlp.up_proj", "q_proj"], "all-linear", "attention", r".*\.[02]\..*"]
)
terms = st.tuples(
    st.sampled_from("abc"), weights | st.lists(weights, min_size=1, max_size=4), filters, filters | st.none()
)


def matches(target, pattern):
    """The language of targets, written once more."""
    if isinstance(pattern, list):
        return any(target.endswith("." + name) for name in pattern)
    return pattern == "all-linear" or (
        ".self_attn." in target if pattern == "attention" else re.fullmatch(pattern, target)
    )


def share(term, target):
    """What a term takes of a target; None where its filter leaves it out."""
    _, weight, include, exclude = term
    if (include is not None and not matches(target, include)) or (exclude is not None and matches(target, exclude)):
        return None
    return weight_at(weight, int(target.split(".")[2]), 3)


def line(term):
    """A term as JSON, which is YAML."""
    fields = dict(zip(("adapter", "weight", "include", "exclude"), term, strict=True))
    return json.dumps({name: value for name, value in fields.items() if value is not None})


def weight_at(weight, layer, layers):
    if not isinstance(weight, list):
        return weight
    return float(torch.nn.functional.interpolate(  # torch's own straight lines
        torch.tensor([[weight]], dtype=torch.float64), layers, mode="linear", align_corners=True
    )[0, 0, layer]) if layers > 1 else weight[0]  # fmt: skip


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    folder = tmp_path_factory.mktemp("three")
    adapters = {name: drawn(seed, rank=1 + seed) for seed, name in enumerate("abc")}
    for name, adapter in adapters.items():
        lf.save(adapter, folder / name)
    return folder, adapters


@settings(max_examples=60)
@given(st.lists(terms, min_size=1, max_size=4), st.lists(terms, min_size=1, max_size=2))
def test_a_result_is_the_float64_sum_of_dense_updates(three, first, second):
    """A sum of a sum: filters, gradients and weights of any sign, against dense float64."""
    folder, adapters = three
    known = {name: dense(adapter) for name, adapter in adapters.items()}
    one, two = (", ".join(map(line, found)) for found in (first, second))
    (folder / "r.yaml").write_text(
        "recipe: 1\ninputs: {a: ./a, b: ./b, c: ./c}\n"
        f"steps:\n  one: {{from: [{one}]}}\n  two: {{from: [one, {two}]}}\nresult: two\n"
    )
    shares = [(term, target, share(term, target)) for term in [*first, *second] for target in known[term[0]]]
    left = [[s for t, _, s in shares if t is term and s is not None] for term in [*first, *second]]
    if any(not found or (isinstance(term[1], list) and not any(found))
           for term, found in zip([*first, *second], left, strict=True)):  # fmt: skip
        with pytest.raises(RecipeError, match=r"r\.yaml:\d+:\d+: "):
            lf.Recipe.load(folder / "r.yaml").preview()
        return
    made = lf.Recipe.load(folder / "r.yaml").preview().adapter
    wanted, sizes = {}, {}
    for (name, *_), target, taken in shares:
        if taken is not None:
            wanted[target] = wanted.get(target, 0) + taken * known[name][target]
            sizes[target] = sizes.get(target, 0) + abs(taken) * float(known[name][target].norm())
    assert set(made.targets) <= set(wanted)
    for target, update in wanted.items():
        got = made.targets[target].delta() if target in made.targets else torch.zeros(())
        assert float((got - update).norm()) <= 1e-6 * sizes[target] + 1e-12


def test_the_formula_of_a_gradient():
    assert [interpolated([0, 1], layer, 5) for layer in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert [interpolated([1, 3, 2], layer, 5) for layer in range(5)] == [1, 2, 3, 2.5, 2]
    assert [interpolated([4], layer, 3) for layer in range(3)] == [4, 4, 4]
    assert interpolated([7, 9], 0, 1) == 7


def test_a_gradient_goes_over_the_layers_that_are_said_or_that_any_input_has(tmp_path):
    lf.save(drawn(1, layers=2), tmp_path / "shallow")
    lf.save(drawn(2, layers=5), tmp_path / "deep")
    text = (
        "recipe: 1\ninputs: {a: ./shallow, b: ./deep}\nsteps: {s: {from: [{adapter: a, weight: [0, 1]}]}}\nresult: s\n"
    )
    for more, scales in (("", [0.25]), ("layers: 11\n", [0.1]), ("layers: 2\n", [1.0])):
        (tmp_path / "r.yaml").write_text(more + text)
        made = lf.Recipe.load(tmp_path / "r.yaml").preview().adapter
        ratios = {p.scale / lf.load(tmp_path / "shallow").targets[n].scale for n, p in made.targets.items()}
        assert sorted(ratios) == pytest.approx(scales)
    (tmp_path / "r.yaml").write_text("layers: 1\n" + text)
    with pytest.raises(RecipeError, match="beyond the 1 layers"):
        lf.Recipe.load(tmp_path / "r.yaml").preview()


def test_select_keeps_factors_bit_for_bit_and_refuses_what_has_no_part():
    adapter = drawn(3)
    part = lf.select(adapter, include=["mlp.up_proj"], gradient=[1, 2])
    assert {name.rpartition(".")[2] for name in part.targets} == {"up_proj"}
    for name, pair in part.targets.items():
        assert torch.equal(pair.a, adapter.targets[name].a)
        assert pair.scale == adapter.targets[name].scale * (1 + int(name.split(".")[2]) / 2)
    for bad in ({}, {"include": []}, {"gradient": [float("nan")]}, {"gradient": [0.0]}, {"layers": 3}):
        with pytest.raises(CompositionError):
            lf.select(adapter, **bad)


# ---- what is done again


def test_unchanged_steps_are_found_and_changed_ones_made(store, recipe):
    first = lf.Recipe.load(recipe).run(store, name="blend:v1")
    assert found(first) == {"sum": False, "part": False, "small": False}
    again = lf.Recipe.load(recipe).run(store, name="blend:v1")
    assert found(again) == {"sum": True, "part": True, "small": True}
    assert again.digest == first.digest == store.store.resolve("blend:v1")
    recipe.write_text(BLEND.replace("rank: 2", "rank: 1"))
    changed = lf.Recipe.load(recipe).run(store)
    assert found(changed) == {"sum": True, "part": True, "small": False}
    assert changed.digest != first.digest


def test_without_the_index_or_after_a_collection_steps_are_made_again_to_the_same_digest(store, recipe):
    first = lf.Recipe.load(recipe).run(store)
    (store.store.path / "index.sqlite").unlink()
    again = lf.Recipe.load(recipe).run(store)
    assert not any(found(again).values())
    store.store.gc(dry_run=False, now=True)
    last = lf.Recipe.load(recipe).run(store)
    assert not any(found(last).values())
    assert first.digest == again.digest == last.digest


def test_a_manifest_from_elsewhere_is_no_result(store, recipe, tmp_path):
    """What somebody else's manifest says it was derived by is not taken for having been done."""
    first = lf.Recipe.load(recipe).run(store, name="blend:v1")
    other = lf.Registry(tmp_path / "other")
    store.store.export_bundle([first.digest], {}, tmp_path / "bundle.lf")
    other.store.import_bundle(tmp_path / "bundle.lf")
    other.tag(str(first.pins["french"].digest), "french:v1")
    other.tag(str(first.pins["law"].digest), "law:v1")
    made = lf.Recipe.load(recipe).run(other)
    assert not any(found(made).values())
    assert made.digest == first.digest


def test_a_damaged_row_of_the_index_is_no_answer(store, recipe):
    import sqlite3

    first = lf.Recipe.load(recipe).run(store)
    with sqlite3.connect(store.store.path / "index.sqlite") as database:
        database.execute("UPDATE result SET artifact = (SELECT artifact FROM result ORDER BY artifact LIMIT 1)")
    database.close()
    assert lf.Recipe.load(recipe).run(store).digest == first.digest


@pytest.mark.parametrize("steps", [1, 2])
def test_a_run_that_is_killed_between_steps_goes_on(store, recipe, steps):
    """kill -9 behind the n-th step: no lock, no name; the next run finds n steps and ends in the same digest."""
    script = textwrap.dedent(f"""\
        import os, signal
        import loraforge as lf
        from loraforge_registry.store import Store
        done, before = [], Store.remember
        def remember(*arguments):
            before(*arguments)
            done.append(1)
            if len(done) == {steps}:
                os.kill(os.getpid(), signal.SIGKILL)
        Store.remember = remember
        lf.Recipe.load({str(recipe)!r}).run(lf.Registry({str(store.store.path)!r}), name="blend:v1")
    """)
    died = subprocess.run([sys.executable, "-c", script], env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    assert died.returncode == -signal.SIGKILL
    assert not recipe.with_suffix(".lock").exists()
    with pytest.raises(NotFoundError):
        store.store.resolve("blend:v1")
    made = lf.Recipe.load(recipe).run(store, name="blend:v1")
    assert list(found(made).values()) == [True] * steps + [False] * (3 - steps)
    fresh = lf.Registry(recipe.parent / "fresh")
    fresh.push(drawn(1), "french:v1")
    fresh.push(drawn(2, rank=3), "law:v1")
    assert lf.Recipe.load(recipe).run(fresh).digest == made.digest
    assert {problem.kind for problem in store.store.fsck(deep=True).problems} <= {"leftover"}  # a dead session's pins


# ---- the lock


def test_a_lock_pins_and_says_when_a_ref_has_moved(store, recipe):
    first = lf.Recipe.load(recipe).run(store, name="blend:v1")
    assert lock_of(recipe)["french"]["digest"] == str(store.store.resolve("french:v1"))
    kept = recipe.with_suffix(".lock").read_bytes()
    store.push(drawn(9), "french:v1", force=True)
    later = lf.Recipe.load(recipe).run(store)
    assert later.digest == first.digest
    assert any("french:v1 has moved" in note for note in later.notes)
    assert recipe.with_suffix(".lock").read_bytes() == kept
    updated = lf.Recipe.load(recipe).run(store, update=True)
    assert updated.digest != first.digest
    assert not updated.notes
    assert lock_of(recipe)["french"]["digest"] == str(store.store.resolve("french:v1"))


def test_a_ref_that_is_gone_is_still_pinned_and_an_artifact_that_is_gone_is_not_replaced(store, recipe):
    first = lf.Recipe.load(recipe).run(store)
    store.remove("french:v1")
    later = lf.Recipe.load(recipe).run(store)
    assert later.digest == first.digest
    assert any("there is no french:v1 any more" in note for note in later.notes)
    store.store.gc(dry_run=False, now=True)
    with pytest.raises(NotFoundError, match=r"blend\.yaml:2:18: french \(french:v1\) is pinned to sha256"):
        lf.Recipe.load(recipe).run(store)


def test_a_directory_with_other_content_is_refused_until_update(store, recipe):
    lf.save(drawn(5), recipe.parent / "five")
    recipe.write_text(BLEND.replace("law: law:v1", "law: ./five"))
    first = lf.Recipe.load(recipe).run(store)
    (recipe.parent / "five" / "README.md").write_text("# Five\n")
    assert lf.content_id(lf.Recipe.load(recipe).run(store).adapter) == lf.content_id(first.adapter)
    kept = recipe.with_suffix(".lock").read_bytes()
    (recipe.parent / "five").rename(recipe.parent / "was")
    lf.save(drawn(6), recipe.parent / "five")
    with pytest.raises(RecipeError, match=r"blend\.yaml:2:34: law \(\./five\) holds content"):
        lf.Recipe.load(recipe).run(store)
    assert recipe.with_suffix(".lock").read_bytes() == kept
    assert lf.Recipe.load(recipe).run(store, update=True).digest != first.digest


def test_an_input_that_the_recipe_calls_otherwise_is_pinned_anew(store, recipe):
    lf.Recipe.load(recipe).run(store)
    recipe.write_text(BLEND.replace("law: law:v1", "law: french:v1"))
    lf.Recipe.load(recipe).run(store)
    assert lock_of(recipe)["law"]["digest"] == lock_of(recipe)["french"]["digest"]


def test_a_lock_that_somebody_changed_is_refused(store, recipe):
    lf.Recipe.load(recipe).run(store)
    lock = recipe.with_suffix(".lock")
    content = lock_of(recipe)["law"]["content_id"]
    lock.write_text(lock.read_text().replace(content, str(Digest.of(b"other"))))
    with pytest.raises(RecipeError, match="somebody changed the lock"):
        lf.Recipe.load(recipe).run(store)


def test_a_preview_and_a_lock_alone_store_nothing(store, recipe, tmp_path):
    lf.save(drawn(5), recipe.parent / "five")
    recipe.write_text(BLEND.replace("law: law:v1", "law: ./five"))
    before = sorted(p for p in store.store.path.rglob("*") if p.name != "index.sqlite")
    made = lf.Recipe.load(recipe).preview(store)
    assert made.digest is None
    assert made.report.targets
    assert not recipe.with_suffix(".lock").exists()
    pins = lf.Recipe.load(recipe).lock(store)
    assert sorted(p for p in store.store.path.rglob("*") if p.name != "index.sqlite") == before
    assert lf.Recipe.load(recipe).run(store).pins == pins
    empty = lf.Registry(tmp_path / "none")
    with pytest.raises(NotFoundError):
        lf.Recipe.load(recipe).run(empty)
    assert not (tmp_path / "none").exists()


def test_a_directory_need_not_be_in_the_store_first_and_is_kept_by_the_lineage(recipe, tmp_path):
    lf.save(drawn(5), recipe.parent / "five")
    recipe.write_text(
        "recipe: 1\ninputs: {five: ./five}\nsteps: {s: {from: [{adapter: five, weight: 2}]}}\nresult: s\n"
    )
    registry = lf.Registry(tmp_path / "new")
    made = lf.Recipe.load(recipe).run(registry, name="twice:v1")
    registry.store.gc(dry_run=False, now=True)
    assert registry.store.has(made.pins["five"].digest)
    assert distance(dense(registry.load("twice:v1")), {n: 2 * d for n, d in dense(drawn(5)).items()}) < 1e-12
    assert len(made.adapter.targets) == 3 * len(SHAPES)


def test_what_the_result_does_not_use_is_said(store, recipe):
    recipe.write_text(BLEND.replace("result: small", "result: sum"))
    made = lf.Recipe.load(recipe).run(store)
    assert list(found(made)) == ["sum"]
    assert made.notes == ("not used by the result: part, small",)


def test_thousands_of_steps_in_a_chain_are_ordered(tmp_path):
    chain = "".join(f"  s{n}: {{from: [s{n + 1}]}}\n" for n in range(8000))
    (tmp_path / "r.yaml").write_text(
        f"recipe: 1\ninputs: {{a: ./a}}\nsteps:\n{chain}  s8000: {{from: [a]}}\nresult: s0\n"
    )
    order = lf.Recipe.load(tmp_path / "r.yaml").document.order
    assert [order[0].name, order[-1].name, len(order)] == ["s8000", "s0", 8001]
