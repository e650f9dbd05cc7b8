"""What an adapter is made of, found from its numbers alone."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import loraforge as lf
from loraforge import lowrank
from loraforge.compose import explain
from loraforge.errors import CompositionError
from tests.unit.recipe.adapters import dense, drawn


def flat(adapter, names):
    return torch.cat([adapter.targets[n].delta().flatten() if n in adapter.targets else torch.zeros(0) for n in names])


def test_the_inner_product_of_factors_is_that_of_the_dense_matrices():
    g = torch.Generator().manual_seed(0)
    a1, b1, a2, b2 = (torch.randn(*shape, generator=g) for shape in ((3, 9), (7, 3), (5, 9), (7, 5)))
    dense_product = ((b1.double() @ a1.double()) * (b2.double() @ a2.double())).sum()
    assert lowrank.inner(a1, b1, a2, b2) == pytest.approx(float(dense_product), rel=1e-12)


@settings(max_examples=25)
@given(st.lists(st.floats(0.02, 3) | st.floats(-3, -0.02), min_size=1, max_size=4), st.integers(0, 10**6))
def test_an_exact_combination_is_found_with_its_coefficients(coefficients, seed):
    others = {str(n): drawn(seed + n, rank=1 + n % 3) for n in range(7)}
    wanted = {str(n): c for n, c in enumerate(coefficients)}
    made = lf.linear([(others[name], c) for name, c in wanted.items()])
    found = explain(made, others)
    assert found.residual < 3e-7
    assert {part.label for part in found.parts} == set(wanted)
    for part in found.parts:
        assert part.coefficient == pytest.approx(wanted[part.label], rel=1e-4)


@settings(max_examples=15)
@given(st.integers(0, 10**6))
def test_coefficients_and_residual_are_those_of_dense_least_squares(seed):
    """No exact lineage: the same answer as torch.linalg.lstsq on the dense matrices of what was taken."""
    others = {str(n): drawn(seed + n, rank=2) for n in range(4)}
    noise = drawn(seed + 99, rank=3)
    made = lf.linear([(others["0"], 1.0), (others["2"], -0.5), (noise, 0.4)])
    found = explain(made, others)
    names = sorted(made.targets)
    x = torch.stack([flat(others[part.label], names) for part in found.parts], dim=1)
    y = flat(made, names)
    wanted = torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
    torch.testing.assert_close(torch.tensor([p.coefficient for p in found.parts], dtype=torch.float64), wanted)
    assert found.residual == pytest.approx(float((y - x @ wanted).norm() / y.norm()), rel=1e-9)
    for name, residual in found.targets.items():
        y, x = made.targets[name].delta(), [others[p.label].targets[name].delta() for p in found.parts]
        left = y - sum(p.coefficient * update for p, update in zip(found.parts, x, strict=True))
        assert residual == pytest.approx(float(left.norm() / y.norm()), rel=1e-9)


def test_candidates_that_depend_on_each_other_give_a_small_set():
    """Copies, blends and a zero among the candidates: still two parts, with the least residual."""
    a, b = drawn(1), drawn(2)
    others = {"a": a, "b": b, "copy": lf.linear([(a, 2.0)]), "blend": lf.linear([(a, 1.0), (b, 1.0)])}
    zero = replace(a, targets={n: replace(p, b=torch.zeros_like(p.b)) for n, p in a.targets.items()})
    found = explain(lf.linear([(a, 0.25), (b, -0.75)]), others | {"zero": zero})
    assert len(found.parts) == 2
    assert found.residual < 3e-7


def test_a_greedy_first_choice_is_dropped_when_others_make_it_needless():
    a, b, c = drawn(1), drawn(2), drawn(3)
    near = lf.linear([(a, 1.0), (b, 1.0), (c, 0.3)])  # nearer to a + b than either of them
    found = explain(lf.linear([(a, 1.0), (b, 1.0)]), {"near": near, "a": a, "b": b})
    assert {part.label for part in found.parts} == {"a", "b"}
    assert found.residual < 3e-7


def test_what_has_nothing_in_common_is_not_used():
    other = replace(drawn(2), targets={"elsewhere.q": next(iter(drawn(2).targets.values()))})
    wide = drawn(3)
    wide = replace(wide, targets={n: replace(p, a=torch.ones(2, 9)) for n, p in wide.targets.items()})
    found = explain(drawn(1), {"other": other, "wide": wide})
    assert (found.parts, found.candidates) == ((), 0)
    assert found.residual == pytest.approx(1)
    assert set(found.left_out) == {"other", "wide"}
    magnitude = torch.ones(12)
    dora = {n: replace(p, magnitude=magnitude) for n, p in drawn(1).targets.items()}
    with pytest.raises(CompositionError, match="DoRA"):
        explain(replace(drawn(1), targets=dora), {"a": drawn(2)})
    with pytest.raises(CompositionError, match="no other adapters"):
        explain(drawn(1), {})


def test_a_store_explains_by_what_was_not_itself_derived(tmp_path):
    store = lf.Registry(tmp_path / "store")
    for seed, name in enumerate(("french", "law", "medicine")):
        store.push(drawn(seed, rank=1 + seed), f"{name}:v1")
    store.push(drawn(7, base="other/base"), "foreign:v1")
    french, law = store.load("french:v1"), store.load("law:v1")
    blend = lf.linear([(french, 0.7), (law, 0.3)])
    store.push(blend, "blend:v1")
    store.push(lf.linear([(store.load("blend:v1"), 0.5)]), "half:v1")
    found = lf.explain("blend:v1", store)
    assert {p.label: round(p.coefficient, 5) for p in found.parts} == {"french:v1": 0.7, "law:v1": 0.3}
    assert found.candidates == 3
    again = lf.explain("half:v1", store, derived=True)
    assert {p.label: round(p.coefficient, 5) for p in again.parts} == {"blend:v1": 0.5}
    assert lf.explain("blend:v1", store, derived=True).candidates == 3, "not by what was made from it"
    only = lf.explain(blend, store, among=["law:v1"])
    assert [part.label for part in only.parts] == ["law:v1"]
    assert only.residual > 0.5
    assert dense(blend)


def test_a_copy_of_a_known_adapter_is_that_adapter(tmp_path):
    """Also where it has the same content: what is left out is the artifact itself, not its equals."""
    store = lf.Registry(tmp_path / "store")
    store.push(drawn(1), "french:v1")
    store.push(drawn(2), "law:v1")
    french = store.load("french:v1")
    store.push(lf.linear([(french, 0.7), (french, 0.3)]), "twice:v1")
    for source in ("twice:v1", drawn(1)):
        found = lf.explain(source, store)
        assert [part.label for part in found.parts] == ["french:v1"]
        assert found.residual < 1e-6
    assert lf.explain("french:v1", store).residual == pytest.approx(1)
