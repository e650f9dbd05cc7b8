"""Numbers: our sums and re-ranks against the float64 sum of dense deltas, and against PEFT where PEFT is right."""

import pytest
import torch
from torch import nn

import loraforge as lf
from tests.conformance.peft_cases import CASES, load, make, write

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own remarks about its layers

# Options that leave an adapter additive; patterns, ranks and alphas differ between the two adapters of a pair.
ADDITIVE = {
    "linear": ({"r": 2, "lora_alpha": 3}, {"r": 5, "lora_alpha": 16}),
    "rslora": ({"r": 3, "lora_alpha": 6, "use_rslora": True}, {"r": 4, "lora_alpha": 4}),
    "patterns": (
        {"r": 2, "lora_alpha": 3, "rank_pattern": {"fc": 4}, "alpha_pattern": {"head": 5}},
        {"r": 3, "lora_alpha": 1, "alpha_pattern": {"fc": 8}},
    ),
}
MODELS = {
    "linear": make.two_linears,
    "conv1d_gpt2": make.modules(fc=make.Conv1D(10, 6), head=make.Conv1D(6, 10)),
    "embedding": make.modules(fc=nn.Embedding(10, 6), head=nn.Embedding(7, 4)),
    "conv1d": make.modules(fc=nn.Conv1d(6, 8, 3), head=nn.Conv1d(8, 4, 1)),
    "conv2d": make.modules(fc=nn.Conv2d(6, 8, (3, 2)), head=nn.Conv2d(8, 4, 1)),
    "conv3d": make.modules(fc=nn.Conv3d(4, 6, (1, 2, 3)), head=nn.Conv3d(6, 4, (2, 1, 1))),
}


def dense(adapter, target):
    """The float64 delta from the definition, written out again: scale times B A, no code of ours but the factors."""
    pair = adapter.targets[target]
    scale = pair.alpha / (pair.rank**0.5 if pair.rslora else pair.rank)
    return scale * (pair.b.double().flatten(1) @ pair.a.double().flatten(1))


def two(model, options, tmp_path):
    fan = {"fan_in_fan_out": True} if model == "conv1d_gpt2" else {}
    configs = [{"target_modules": ["fc", "head"], **fan, **config} for config in ADDITIVE[options]]
    written = [write(make.Case(MODELS[model], c), tmp_path / str(i), seed=i) for i, c in enumerate(configs)]
    return written, [lf.load(item.folder) for item in written]


@pytest.mark.parametrize("options", ADDITIVE)
@pytest.mark.parametrize("model", MODELS)
def test_linear_is_the_sum_of_dense_deltas(model, options, tmp_path):
    written, (first, second) = two(model, options, tmp_path)
    weights = (0.7, -1.3)
    ours = lf.linear([(first, weights[0]), (second, weights[1])])
    lf.save(ours, tmp_path / "ours")
    in_peft = load(written[0], tmp_path / "ours")
    for target in ("fc", "head"):
        exact = weights[0] * dense(first, target) + weights[1] * dense(second, target)
        assert (dense(ours, target) - exact).norm() < 1e-6 * exact.norm()
        layer = in_peft.get_submodule(f"base_model.model.{target}").get_delta_weight("default").double()
        flat = layer.T if model in ("embedding", "conv1d_gpt2") else layer.flatten(1)
        assert (flat - exact).norm() < 1e-6 * exact.norm()


@pytest.mark.parametrize("model", MODELS)
def test_stack_is_the_sum(model, tmp_path):
    _, adapters = two(model, "patterns", tmp_path)
    ours = lf.stack(adapters)
    for target in ("fc", "head"):
        exact = sum(dense(adapter, target) for adapter in adapters)
        assert (dense(ours, target) - exact).norm() < 1e-6 * exact.norm()
        assert ours.targets[target].rank == sum(adapter.targets[target].rank for adapter in adapters)


@pytest.mark.parametrize("model", MODELS)
def test_rerank_is_the_optimum_of_a_dense_svd(model, tmp_path):
    written, adapters = two(model, "linear", tmp_path)
    blend = lf.stack(adapters)
    small = lf.rerank(blend, rank=2)
    lf.save(small.adapter, tmp_path / "small")
    load(written[0], tmp_path / "small")
    for target, report in small.report.targets.items():
        exact = dense(blend, target)
        s = torch.linalg.svdvals(exact)
        optimum = float(s[2:].norm() / s.norm())
        measured = float((dense(small.adapter, target) - exact).norm() / exact.norm())
        assert report.error == pytest.approx(optimum, rel=1e-6, abs=1e-7)
        assert measured == pytest.approx(report.error, rel=1e-6, abs=1e-7)
        assert torch.allclose(torch.tensor(report.spectrum).double(), s[: len(report.spectrum)], rtol=1e-5, atol=1e-9)


def test_average_of_an_adapter_with_itself_is_itself(tmp_path):
    """PEFT's linear gives twice the adapter here."""
    written = write(CASES["patterns"], tmp_path / "theirs")
    adapter = lf.load(written.folder)
    ours = lf.linear([(adapter, 0.5), (lf.load(written.folder), 0.5)])
    assert lf.content_id(ours) == lf.content_id(adapter)

    fc = make.Case(make.two_linears, {"r": 2, "lora_alpha": 2, "target_modules": ["fc"]})
    simple = write(fc, tmp_path / "simple")
    theirs = load(simple, simple.folder)
    theirs.load_adapter(str(simple.folder), "same", autocast_adapter_dtype=False)
    theirs.add_weighted_adapter(["default", "same"], [0.5, 0.5], "both", combination_type="linear")
    layer = theirs.base_model.model["fc"]
    assert torch.allclose(layer.get_delta_weight("both"), 2 * layer.get_delta_weight("default"), rtol=1e-5)


@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_agrees_with_pefts_exact_combinations(kind, tmp_path):
    config = {"r": 3, "lora_alpha": 6, "target_modules": ["fc", "head"]}
    written = [write(make.Case(make.two_linears, config), tmp_path / str(i), seed=i) for i in (0, 1)]
    model = load(written[0], written[0].folder)
    model.load_adapter(str(written[1].folder), "second", autocast_adapter_dtype=False)
    options = {"svd_rank": 3} if kind == "svd" else {}
    model.add_weighted_adapter(["default", "second"], [0.6, 0.4], "both", combination_type=kind, **options)
    ours = lf.linear([(lf.load(written[0].folder), 0.6), (lf.load(written[1].folder), 0.4)])
    ours = lf.rerank(ours, rank=3).adapter if kind == "svd" else ours
    for target in ("fc", "head"):
        theirs = model.base_model.model[target].get_delta_weight("both").double()
        assert (dense(ours, target) - theirs).norm() < 2e-6 * theirs.norm()


def test_lora_bias_adds_up(tmp_path):
    configs = [
        {"r": 2, "lora_alpha": 6, "lora_bias": True, "target_modules": ["fc"]},
        {"r": 3, "lora_alpha": 2, "target_modules": ["fc", "head"]},
    ]
    written = [write(make.Case(make.two_linears, c), tmp_path / str(i), seed=i) for i, c in enumerate(configs)]
    first, second = (lf.load(item.folder) for item in written)
    ours = lf.linear([(first, 0.5), (second, 2.0)])
    lf.save(ours, tmp_path / "ours")
    pair = ours.targets["fc"]
    assert torch.allclose(pair.scale * pair.bias, 0.5 * 3 * first.targets["fc"].bias)
    x = torch.randn(4, 6)
    base = written[0].base
    want = base["fc"](x) + 0.5 * _effect(written[0], x) + 2.0 * _effect(written[1], x)
    got = load(written[0], tmp_path / "ours").base_model.model["fc"](x)
    assert torch.allclose(got, want, atol=1e-5)


def _effect(written, x):
    return load(written, written.folder).base_model.model["fc"](x) - written.base["fc"](x)


@pytest.mark.parametrize("name", ["dora_linear", "modules_to_save", "trainable_tokens", "bias_all", "conv2d_grouped"])
def test_refuses_what_is_not_additive_and_says_what_to_do(name, tmp_path):
    adapters = [lf.load(write(CASES[name], tmp_path / str(seed), seed=seed).folder) for seed in (0, 1)]
    with pytest.raises(lf.LoraforgeError, match=r"DoRA|drop_saved|grouped"):
        lf.linear([(adapters[0], 0.5), (adapters[1], 0.5)])
    if name in ("modules_to_save", "trainable_tokens", "bias_all"):
        assert not lf.linear([(adapters[0], 0.5), (adapters[1], 0.5)], drop_saved=True).extras


def test_equal_saved_modules_stay_where_the_weights_add_up_to_one(tmp_path):
    adapter = lf.load(write(CASES["modules_to_save"], tmp_path / "one").folder)
    kept = lf.linear([(adapter, 0.5), (adapter, 0.5)])
    assert set(kept.extras) == {"head.weight", "head.bias"}
    with pytest.raises(lf.LoraforgeError, match="add up to 1"):
        lf.linear([(adapter, 0.5), (adapter, 1.0)])
