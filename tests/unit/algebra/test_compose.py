"""Laws of the sum and the re-rank, over adapters of any mixture."""

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import loraforge as lf
from loraforge.adapter import Adapter, LowRank
from loraforge.compose import compare, overall
from loraforge_registry.config import Settings

KINDS = {"linear": (), "embedding": (), "conv1d": (3,), "conv2d": (2, 3), "conv3d": (1, 2, 2)}
NAMES = ["m.0.q", "m.0.v", "m.1.q"]


def pair(kind, m, n, rank, *, alpha, rslora, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    kernel = KINDS[kind]
    a = torch.randn((rank, n, *kernel), generator=generator, dtype=torch.float64)
    b = torch.randn((m, rank, *(1 for _ in kernel)), generator=generator, dtype=torch.float64)
    return LowRank(kind, a.to(dtype), b.to(dtype), alpha=alpha, rslora=rslora)


@st.composite
def adapters(draw, kind="linear"):
    """An adapter on some of the three targets, with ranks, alphas and rsLoRA of its own."""
    names = draw(st.lists(st.sampled_from(NAMES), min_size=1, unique=True))
    rslora = draw(st.booleans())
    return Adapter(
        {
            name: pair(
                kind,
                6 + NAMES.index(name),
                5,
                draw(st.integers(1, 7)),
                alpha=draw(st.sampled_from([1.0, 3.0, 16.0, 0.5])),
                rslora=rslora,
                seed=draw(st.integers(0, 2**31)),
            )
            for name in sorted(names)
        },
        Settings(base_name="base"),
    )


WEIGHTS = st.floats(-3, 3).filter(lambda weight: abs(weight) > 1e-3)


def flat(adapter, name):
    """The dense update as a matrix; zero where the adapter has none."""
    if name not in adapter.targets:
        return 0.0
    low = adapter.targets[name]
    return low.scale * (low.b.double().flatten(1) @ low.a.double().flatten(1))


def exact_sum(terms, name):
    return sum(weight * flat(adapter, name) for adapter, weight in terms)


@given(st.lists(st.tuples(adapters(), WEIGHTS), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_linear_is_the_exact_sum_on_the_union_of_targets(terms):
    ours = lf.linear(terms)
    assert set(ours.targets) == set(itertools.chain(*(adapter.targets for adapter, _ in terms)))
    for name in ours.targets:
        bound = sum(abs(weight) * float(torch.as_tensor(flat(a, name)).norm()) for a, weight in terms)
        assert (flat(ours, name) - exact_sum(terms, name)).norm() < 1e-6 * bound


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_adds_up_in_the_shape_of_its_weight(kind):
    low = [pair(kind, 6, 5, r, alpha=3.0, rslora=False, seed=r) for r in (2, 3)]
    ours = lf.stack([Adapter({"t": item}) for item in low]).targets["t"]
    assert ours.delta().shape == ours.shape == low[0].shape
    exact = low[0].delta() + low[1].delta()
    assert (ours.delta() - exact).norm() < 1e-6 * exact.norm()


@given(adapters(), adapters(), adapters())
@settings(max_examples=20, deadline=None, derandomize=True)
def test_stack_is_associative_and_commutative_in_what_it_computes(x, y, z):
    first, second = lf.stack([lf.stack([x, y]), z]), lf.stack([z, lf.stack([y, x])])
    assert overall(compare(first, second)) < 1e-6


@given(adapters())
@settings(max_examples=20, deadline=None, derandomize=True)
def test_one_adapter_at_weight_one_is_itself(adapter):
    ours = lf.linear([(adapter, 1.0)])
    assert ours.targets is adapter.targets
    assert ours.derivation.inputs[0].source == lf.content_id(adapter)


@given(adapters(), WEIGHTS)
@settings(max_examples=20, deadline=None, derandomize=True)
def test_scaling_one_adapter_keeps_its_factors_bit_for_bit(adapter, weight):
    ours = lf.linear([(adapter, weight)])
    for name, low in adapter.targets.items():
        assert torch.equal(ours.targets[name].a, low.a)
        assert ours.targets[name].scale == pytest.approx(weight * low.scale, rel=1e-15)


@given(adapters(), st.integers(2, 5))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_parts_of_an_adapter_add_up_to_it_at_its_own_rank(adapter, parts):
    ours = lf.linear([(adapter, 1 / parts)] * parts)
    for name, low in adapter.targets.items():
        assert ours.targets[name].rank == low.rank
        assert ours.targets[name].scale == pytest.approx(low.scale, rel=1e-14)


@given(adapters())
@settings(max_examples=20, deadline=None, derandomize=True)
def test_an_adapter_cancels_with_its_negative_exactly(adapter):
    ours = lf.linear([(adapter, 0.7), (adapter, -0.7)])
    assert set(ours.targets) == set(adapter.targets)
    assert all(float(low.delta().abs().max()) == 0 for low in ours.targets.values())


def test_weights_that_cancel_but_for_rounding_cancel():
    adapter = Adapter({"t": pair("linear", 6, 5, 2, alpha=2.0, rslora=False, seed=1)})
    zero = lf.linear([(adapter, 0.1), (adapter, 0.2), (adapter, -0.3)]).targets["t"]
    assert not zero.delta().any()


def test_a_small_weight_is_not_rounding():
    small, large = (Adapter({"t": pair("linear", 6, 5, 2, alpha=2.0, rslora=False, seed=s)}) for s in (1, 2))
    assert lf.linear([(small, 1e-20), (large, 1.0)]).targets["t"].rank == 4


def test_an_origin_is_not_believed_once_the_adapter_was_changed(tmp_path):
    registry = lf.Registry(tmp_path / "store")
    registry.push(Adapter({"t": pair("linear", 6, 5, 2, alpha=2.0, rslora=False, seed=1)}), "a:v1")
    loaded = registry.load("a:v1")
    assert lf.linear([(loaded, 0.5)]).derivation.inputs[0].source == loaded.origin
    edited = dataclasses.replace(loaded, targets={"t": dataclasses.replace(loaded.targets["t"], alpha=9.0)})
    assert lf.linear([(edited, 0.5)]).derivation.inputs[0].source == lf.content_id(edited)


@given(adapters(), adapters())
@settings(max_examples=20, deadline=None, derandomize=True)
def test_rerank_at_full_rank_loses_nothing(x, y):
    blend = lf.stack([x, y])
    small = lf.rerank(blend, rank=1000)
    assert small.report.error < 1e-12
    assert overall(compare(blend, small.adapter)) < 1e-6


@given(adapters(), adapters(), st.integers(1, 4))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_rerank_reports_the_error_it_makes_and_it_is_the_least(x, y, rank):
    blend = lf.linear([(x, 1.0), (y, -0.5)])
    small = lf.rerank(blend, rank=rank)
    lost = total = 0.0
    for name, report in small.report.targets.items():
        dense = flat(blend, name)
        measured = float((flat(small.adapter, name) - dense).norm())
        optimum = float(torch.linalg.svdvals(dense)[report.rank :].norm())
        norm = float(dense.norm())
        assert measured == pytest.approx(report.error * norm, rel=1e-6, abs=1e-6 * norm)
        assert optimum == pytest.approx(report.error * norm, rel=1e-6, abs=1e-9 * norm)
        lost, total = lost + measured**2, total + norm**2
    assert math.sqrt(lost / total) == pytest.approx(small.report.error, rel=1e-6, abs=1e-6)


@given(adapters(), adapters(), st.floats(0.05, 1.0))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_energy_keeps_the_share_with_the_smallest_rank(x, y, share):
    blend = lf.stack([x, y])
    for report in lf.rerank(blend, energy=share).report.targets.values():
        s = torch.tensor(report.spectrum).double()
        energy = s.square().cumsum(0) / s.square().sum()
        assert energy[report.rank - 1] >= share - 1e-9
        assert report.rank == 1 or energy[report.rank - 2] < share + 1e-9


def test_budget_takes_the_directions_that_remove_most_error_for_each_parameter():
    """Against every allocation there is, on a case small enough to try them all."""
    blend = lf.stack([Adapter({f"t.{m}": pair("linear", m, 5, 4, alpha=4.0, rslora=False, seed=m) for m in (4, 9, 7)})])
    full = {name: torch.linalg.svdvals(flat(blend, name)).square() for name in blend.targets}
    cost = {name: sum(low.shape) for name, low in blend.targets.items()}
    for budget in range(sum(cost.values()), sum(4 * c for c in cost.values()) + 1, 5):
        report = lf.rerank(blend, max_parameters=budget).report
        spent = sum(report.targets[name].rank * cost[name] for name in cost)
        lost = sum(float(full[name][report.targets[name].rank :].sum()) for name in cost)
        assert spent == report.parameters <= budget
        best_at_spent = min(
            sum(float(full[name][k:].sum()) for name, k in zip(cost, ranks, strict=True))
            for ranks in itertools.product(range(1, 5), repeat=3)
            if sum(k * cost[name] for name, k in zip(cost, ranks, strict=True)) <= budget
        )
        one_direction = max(float(values.max()) for values in full.values())
        assert best_at_spent - 1e-9 <= lost <= best_at_spent + one_direction


def test_budget_respects_the_least_and_the_greatest_rank():
    blend = Adapter({f"t.{m}": pair("linear", m, 9, 6, alpha=4.0, rslora=False, seed=m) for m in (8, 9)})
    report = lf.rerank(blend, max_parameters=120, min_rank=2, max_rank=4).report
    assert all(2 <= target.rank <= 4 for target in report.targets.values())
    with pytest.raises(lf.LoraforgeError, match="takes"):
        lf.rerank(blend, max_parameters=20, min_rank=2)


def test_a_zero_adapter_becomes_a_zero_of_rank_one():
    zero = LowRank("linear", torch.randn(4, 5), torch.zeros(6, 4), alpha=4.0)
    small = lf.rerank(Adapter({"t": zero}), energy=0.9)
    assert small.adapter.targets["t"].rank == 1
    assert small.report.error == 0
    assert not small.adapter.targets["t"].delta().any()


def test_results_stay_in_sixteen_bits_only_where_nothing_was_computed():
    half = pair("linear", 6, 5, 3, alpha=3.0, rslora=False, seed=1, dtype=torch.bfloat16)
    other = pair("linear", 6, 5, 2, alpha=3.0, rslora=False, seed=2, dtype=torch.bfloat16)
    assert lf.linear([(Adapter({"t": half}), 0.3)]).targets["t"].a.dtype == torch.bfloat16
    both = lf.stack([Adapter({"t": half}), Adapter({"t": other})]).targets["t"]
    assert both.a.dtype == torch.float32
    exact = half.delta() + other.delta()
    assert (both.delta() - exact).norm() < 1e-6 * exact.norm()


def test_derivation_records_inputs_weights_and_steps():
    x, y = (Adapter({"t": pair("linear", 6, 5, 2, alpha=2.0, rslora=False, seed=seed)}) for seed in (1, 2))
    made = lf.rerank(lf.linear([(x, 0.7), (y, 0.3)]), rank=2).adapter.derivation
    assert (made.operation, made.parameters) == ("rerank", {"rank": 2})
    below = made.inputs[0].source
    assert (below.operation, [item.weight for item in below.inputs]) == ("linear", [0.7, 0.3])
    assert [item.source for item in below.inputs] == [lf.content_id(x), lf.content_id(y)]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_none_are_refused_by_name(bad):
    low = pair("linear", 6, 5, 2, alpha=2.0, rslora=False, seed=1)
    broken = low.a.clone()
    broken[1, 3] = bad
    adapter = Adapter({"model.q": LowRank("linear", broken, low.b, alpha=2.0)})
    with pytest.raises(lf.LoraforgeError, match=r"'model.q'.*\[1, 3\]"):
        lf.rerank(adapter, rank=1)
    with pytest.raises(lf.LoraforgeError, match="weight"):
        lf.linear([(Adapter({"t": low}), bad)])


@pytest.mark.parametrize(
    "criteria",
    [
        {},
        {"rank": 1, "energy": 0.5},
        {"rank": 0},
        {"energy": 0.0},
        {"energy": 1.5},
        {"max_parameters": 0},
        {"rank": -3},
    ],
)
def test_criteria_that_cannot_be_are_refused(criteria):
    adapter = Adapter({"t": pair("linear", 6, 5, 2, alpha=2.0, rslora=False, seed=1)})
    with pytest.raises(lf.LoraforgeError, match=r"expected|exactly one"):
        lf.rerank(adapter, **criteria)


def test_different_bases_are_refused_unless_one_is_named():
    low = pair("linear", 6, 5, 2, alpha=2.0, rslora=False, seed=1)
    x, y = (Adapter({"t": low}, Settings(base_name=name)) for name in ("llama", "qwen"))
    with pytest.raises(lf.LoraforgeError, match="different bases"):
        lf.stack([x, y])
    assert lf.stack([x, y], base="llama").base.name == "llama"


def test_shapes_that_differ_are_refused():
    x, y = (Adapter({"t": pair("linear", m, 5, 2, alpha=2.0, rslora=False, seed=1)}) for m in (6, 7))
    with pytest.raises(lf.LoraforgeError, match="belong to different bases"):
        lf.stack([x, y])


def test_compare_sees_no_difference_in_another_basis_and_all_of_it_in_another_update():
    low = pair("linear", 6, 5, 3, alpha=3.0, rslora=False, seed=1, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    turned = LowRank("linear", turn @ low.a, 2 * low.b @ turn.T, alpha=1.5)
    assert overall(compare(Adapter({"t": low}), Adapter({"t": turned}))) < 1e-12
    doubled = LowRank("linear", low.a, low.b, alpha=6.0)
    assert overall(compare(Adapter({"t": low}), Adapter({"t": doubled}))) == pytest.approx(0.5)
    assert overall(compare(Adapter({"t": low}), Adapter({"u": low}))) == pytest.approx(2**0.5)
