"""Injection: what it chooses and refuses, what it leaves behind, and the arithmetic in every precision."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import loraforge as lf
from loraforge.errors import TargetError
from loraforge.layers import LoraConfig, attach, inject
from loraforge.layers.dropout import Dropout, draw
from loraforge.layers.forward import weight_norm
from loraforge.layers.linear import Form, lora_linear
from loraforge_registry.errors import ConfigError


def block():
    return nn.ModuleDict(
        {
            "self_attn": nn.ModuleDict({"q_proj": nn.Linear(6, 6), "v_proj": nn.Linear(6, 4, bias=False)}),
            "mlp": nn.ModuleDict({"up_proj": nn.Linear(6, 8), "norm": nn.LayerNorm(6)}),
        }
    )


def model():
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "embed": nn.Embedding(10, 6),
            "layers": nn.ModuleList([block(), block()]),
            "conv": nn.Conv1d(4, 4, 3),
            "lm_head": nn.Linear(6, 10),
        }
    )


def test_layers_are_counted_as_in_peft():
    wrapped = nn.ModuleDict({"model": model()})
    found = inject(wrapped, LoraConfig(targets=("q_proj",), layers=(1,))).targets
    assert list(found) == ["model.layers.1.self_attn.q_proj"]
    with pytest.raises(TargetError, match=r"targets 'q_proj' match no module in layers \(7,\)"):
        inject(wrapped, LoraConfig(targets=("q_proj",), layers=(7,)))


def chosen(**config):
    return list(inject(model(), LoraConfig(**config)).targets)


Q, V, UP = ([f"layers.{i}.{end}" for i in (0, 1)] for end in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj"))


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({"targets": "all-linear"}, Q + V + UP),
        ({"targets": "attention"}, Q + V),
        ({"targets": ["q_proj"]}, Q),
        ({"targets": ("self_attn.q_proj", "embed")}, ["embed", *Q]),
        ({"targets": ("proj",), "exclude": ("nothing",)}, None),
        ({"targets": r"layers\.1\..*_proj"}, [Q[1], V[1], UP[1]]),
        ({"targets": "all-linear", "exclude": ("v_proj",)}, Q + UP),
        ({"targets": "all-linear", "modules_to_save": ("up_proj",)}, Q + V),
        ({"targets": ("lm_head", "conv")}, ["conv", "lm_head"]),
    ],
)
def test_targets_are_spelt_as_in_peft(config, names):
    if names is None:
        with pytest.raises(TargetError, match="match no module; did you mean 'q_proj'"):
            chosen(**config)
        return
    assert chosen(**config) == sorted(names)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"targets": ("q_prj",)}, r"'q_prj' match no module; did you mean 'q_proj'"),
        ({"targets": ("q_proj", "gate_proj")}, r"'gate_proj' matches no module; did you mean"),
        ({"targets": r"model\..*"}, r"match no module; it has 'conv', 'embed', 'lm_head', 'q_proj'"),
        ({"targets": ("norm",)}, r"'layers.0.mlp.norm' is a LayerNorm; expected Linear"),
        ({"targets": ("self_attn",)}, r"'layers.0.self_attn' is a ModuleDict; expected Linear"),
        ({"rank": 0}, "rank is 0"),
        ({"rank_pattern": {"q_proj": 0}}, "q_proj is 0"),
        ({"rank_pattern": {"k_proj": 2}}, r"rank_pattern 'k_proj' matches none of the 6 targets; did you mean"),
        ({"alpha_pattern": {"nope": 2}}, r"alpha_pattern 'nope' matches none"),
        ({"alpha": 0}, "alpha is 0"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"init": "xavier"}, "init is 'xavier', expected one of kaiming"),
        ({"bias": "some"}, "bias is 'some'"),
        ({"targets": ()}, "targets is"),
        ({"dora": True, "init": "pissa"}, "dora and init='pissa' exclude each other"),
        ({"dora": True, "lora_bias": True}, "dora and lora_bias exclude each other"),
        ({"targets": "all-linear", "layers": (0,)}, "layers go with a list of targets"),
        ({"targets": ("embed",), "init": "olora"}, r"'embed': init='olora' is for linear layers"),
        ({"targets": ("v_proj",), "rank": 5, "init": "pissa"}, "has no 5 leading directions"),
        ({"modules_to_save": ("score",)}, "modules_to_save 'score' names no module"),
    ],
)
def test_what_cannot_be_is_refused_by_name_and_leaves_the_model_alone(config, message):
    base = model()
    before = {name: (id(module), list(module.__dict__)) for name, module in base.named_modules()}
    with pytest.raises(TargetError, match=message):
        inject(base, LoraConfig(**config))
    assert {name: (id(module), list(module.__dict__)) for name, module in base.named_modules()} == before
    assert all(parameter.requires_grad for parameter in base.parameters())


def test_a_pattern_that_explodes_is_stopped():
    base = nn.ModuleDict({"a" * 40 + "!": nn.Linear(2, 2)})
    with pytest.raises(ConfigError, match="took too long"):
        inject(base, LoraConfig(targets=r"(a|a)*(a|a)*$"))


class Quantised(nn.Linear):
    def __init__(self):
        super().__init__(4, 4)
        del self.weight
        self.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked():
    layer = nn.Linear(4, 4)
    layer.forward = lambda x: x
    return layer


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (Quantised, r"has a quantised weight \(Parameter, torch.int8\); load the base unquantised"),
        (lambda: Scaled(4, 4), "is a Scaled; expected Linear"),
        (hooked, "is adapted already, or its forward was replaced"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "has no weight of its own"),
        (lambda: nn.Linear(4, 4, device="meta"), "has no weight of its own"),
        (lambda: nn.Embedding(4, 4, max_norm=1.0), "renormalises its rows"),
        (lambda: nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular"), "pads with 'circular'"),
        (lambda: nn.Conv1d(6, 6, 3, groups=3), "is a convolution of 3 groups: its rank, 8, must divide"),
    ],
)
def test_layers_that_cannot_be_adapted_say_why(layer, message):
    with pytest.raises(TargetError, match=f"target 'layer' {message}"):
        inject(nn.ModuleDict({"layer": layer()}), LoraConfig(targets=("layer",)))


def test_all_linear_does_not_leave_out_a_quantised_layer_without_a_word():
    with pytest.raises(TargetError, match="quantised weight"):
        inject(nn.ModuleDict({"fc": nn.Linear(4, 4), "layer": Quantised()}), LoraConfig())


def test_modules_that_are_read_instead_of_called_are_refused():
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with pytest.raises(TargetError, match=r"'self_attn.out_proj' belongs to nn.MultiheadAttention"):
        inject(encoder, LoraConfig(targets=("out_proj",)))
    with pytest.raises(TargetError, match="'linear1' is read, not called, by the fast path"):
        inject(encoder, LoraConfig(targets=("linear1",)))
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        injected = inject(encoder, LoraConfig(targets=("linear1",)))
        nn.init.normal_(injected.parameters()["linear1.lora.b"])
        x = torch.randn(1, 3, 8)
        with torch.no_grad():
            y = encoder.eval()(x)
            with injected.disabled():
                assert not torch.equal(encoder(x), y)
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def test_tied_weights_are_refused_by_both_names():
    tied = model()
    tied["lm_head"].weight = tied["embed"].weight
    with pytest.raises(TargetError, match=r"'lm_head' shares its weight with 'embed.weight'.*untie"):
        inject(tied, LoraConfig(targets=("lm_head",)))
    assert inject(tied, LoraConfig(targets="all-linear")).targets.keys() == {*Q, *V, *UP}


def test_linear_and_conv1d_together_are_refused():
    mixed = nn.ModuleDict({"c": Conv1D(4, 4), "fc": nn.Linear(4, 4)})
    with pytest.raises(TargetError, match="'c' is a Conv1D and 'fc' a Linear"):
        inject(mixed, LoraConfig())


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "pissa", "olora"])
def test_injecting_changes_no_output_and_removing_leaves_no_trace(init):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6), nn.LayerNorm(6))
    base[3].weight.requires_grad_(requires_grad=False)
    flags = [parameter.requires_grad for parameter in base.parameters()]
    before, keys = copy.deepcopy(base.state_dict()), [list(module.__dict__) for module in base.modules()]
    x = torch.randn(4, 6)
    y = base(x)
    injected = inject(base, LoraConfig(rank=2, targets=("0", "2"), init=init, bias="all", modules_to_save=("3",)))
    assert torch.allclose(base(x), y, rtol=1e-5, atol=1e-6)
    optimizer = torch.optim.SGD(injected.parameters().values(), lr=0.1)
    for _ in range(3):
        base(x).square().sum().backward()
        optimizer.step()
    trained = base(x).detach()
    assert not torch.allclose(trained, y)
    with injected.disabled():
        assert torch.equal(base(x), y)
    assert torch.equal(base(x), trained)
    adapter = injected.adapter()
    injected.remove()
    assert base.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())
    assert [parameter.requires_grad for parameter in base.parameters()] == flags
    assert [list(module.__dict__) for module in base.modules()] == keys
    assert torch.equal(base(x), y)
    attach(base, adapter)
    assert torch.allclose(base(x), trained, rtol=1e-5, atol=1e-6)


def test_an_adapter_that_does_not_fit_is_refused_and_the_model_left_alone():
    donor = inject(model(), LoraConfig(rank=2, targets=("q_proj",))).adapter()
    base = model()
    base["layers"][1]["self_attn"]["q_proj"] = nn.Linear(6, 5)
    with pytest.raises(TargetError, match=r"'layers.1.self_attn.q_proj': the adapter has A \[2, 6\] and B \[6, 2\]"):
        attach(base, donor)
    del base["layers"][1]["self_attn"]["q_proj"]
    with pytest.raises(TargetError, match=r"'layers.1.self_attn.q_proj' is not in the model"):
        attach(base, donor)
    assert all(parameter.requires_grad for parameter in base.parameters())
    attach(model(), donor)


def test_an_adapted_model_copies_and_keeps_its_adapter_apart():
    base = model()
    inject(base, LoraConfig(rank=2, targets=("q_proj",)))
    other = copy.deepcopy(base)
    layer, twin = base["layers"][0]["self_attn"]["q_proj"], other["layers"][0]["self_attn"]["q_proj"]
    nn.init.ones_(twin.lora.b)
    x = torch.randn(2, 6)
    assert not torch.equal(layer(x), twin(x))
    with pytest.raises(TargetError, match="adapted already"):
        inject(base, LoraConfig(rank=2, targets=("q_proj",)))


@pytest.mark.parametrize("rate", [0.05, 0.5, 2**-16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_mask_keeps_the_share_it_says_and_is_the_same_twice(rate, dtype):
    count = 1_000_003
    dropout = Dropout(round(rate * 65536), seed=3)
    mask = dropout.mask(torch.empty(count), dtype)
    share = 1 - float(mask.double().mean())
    assert abs(share - rate) < 5 * (rate / count) ** 0.5 + 1e-6
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(mask, dropout.mask(torch.empty(count), dtype))
    assert dropout.gain == pytest.approx(1 / (1 - rate), rel=1e-5)
    neighbours = float((mask[1:].double() * mask[:-1].double()).mean())
    assert abs(neighbours - (1 - rate) ** 2) < 5 * (rate / count) ** 0.5 + 1e-6


def test_masks_come_from_torchs_generator():
    torch.manual_seed(1)
    first, second = draw(0.1), draw(0.1)
    assert first != second
    torch.manual_seed(1)
    assert draw(0.1) == first
    assert draw(0.0) is None


def grads(layer, x, run):
    layer.zero_grad()
    x.grad = None
    run(x).square().sum().backward()
    return [x.grad, *(parameter.grad for parameter in layer.parameters() if parameter.requires_grad)]


@pytest.mark.parametrize("dora", [False, True])
def test_gradient_checkpointing_meets_the_same_mask(dora):
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
    injected = inject(layer, LoraConfig(rank=4, targets=("0", "2"), dropout=0.3, dora=dora))
    for parameter in injected.parameters().values():
        nn.init.normal_(parameter)
    x = torch.randn(8, 16, requires_grad=True)
    torch.manual_seed(7)
    plain = grads(layer, x, layer)
    torch.manual_seed(7)
    again = grads(layer, x, lambda x: checkpoint(layer, x, use_reentrant=False))
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


@pytest.mark.parametrize("option", [{}, {"dora": True}, {"lora_bias": True}, {"init": "pissa"}, {"bias": "all"}])
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_is_near_float64_and_masters_stay_float32(option, autocast):
    torch.manual_seed(0)
    base = nn.Linear(64, 48)
    exact = copy.deepcopy(base).double()
    base = base if autocast else base.bfloat16()
    exact.load_state_dict(base.state_dict())
    config = LoraConfig(rank=4, targets=("layer",), **option)
    holder, reference = nn.ModuleDict({"layer": base}), nn.ModuleDict({"layer": exact})
    injected, truth = inject(holder, config), inject(reference, config)
    for (name, mine), other in zip(injected.parameters().items(), truth.parameters().values(), strict=True):
        if "magnitude" not in name and not name.endswith("bias") and config.init == "kaiming":
            nn.init.normal_(mine, std=0.1)
        with torch.no_grad():
            other.copy_(mine)
    if injected.targets["layer"].lora.start is not None:
        for key in ("start_a", "start_b"):
            setattr(exact.lora, key, getattr(base.lora, key).double())
    x = torch.randn(32, 64).bfloat16() if not autocast else torch.randn(32, 64)
    x.requires_grad_()
    wide = x.detach().double().requires_grad_()

    def run(x):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = base(x)
        assert y.dtype == torch.bfloat16
        return y.double()

    mine, other = grads(holder, x, run), grads(reference, wide, exact)
    for one, two in zip(mine, other, strict=True):
        assert float((one.double() - two).norm() / two.norm()) < 2e-2
    assert all(p.dtype == torch.float32 for name, p in injected.parameters().items() if ".lora." in name)


def test_float16_does_not_overflow_in_the_update():
    torch.manual_seed(0)
    base = nn.ModuleDict({"layer": nn.Linear(16, 16).half()})
    inject(base, LoraConfig(rank=2, targets=("layer",)))
    assert torch.isfinite(base["layer"](torch.full((2, 16), 1e4, dtype=torch.float16))).all()


@pytest.mark.parametrize("shape", [(7, 5), (4, 3, 2, 2)])
def test_the_factored_norm_is_the_norm_of_the_sum(shape):
    torch.manual_seed(0)
    w, a, b = (torch.randn(size, dtype=torch.float64) for size in (shape, (3, *shape[1:]), (shape[0], 3)))
    dense = w + 0.7 * (b @ a.flatten(1)).view(shape)
    assert torch.allclose(weight_norm(w, a, b, 0.7), dense.flatten(1).norm(dim=1), rtol=1e-12)


def test_what_is_kept_for_the_backward_pass_is_the_input_once():
    torch.manual_seed(0)
    base = nn.ModuleDict({name: nn.Linear(256, 256) for name in "qkv"})
    inject(base, LoraConfig(rank=4, targets=tuple("qkv"), dropout=0.1))
    x = torch.randn(128, 256, requires_grad=True) * 1.0
    own = {parameter.data_ptr() for parameter in base.parameters()}
    kept = {}

    def pack(tensor):
        if tensor.data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = [base[name](x) for name in "qkv"]
    assert len(y) == 3
    assert sum(kept.values()) == 128 * 256 * 4 + 3 * 128 * 4 * 4  # x, and u of each


def test_saved_and_pushed_as_any_adapter(tmp_path):
    base = model()
    injected = inject(base, LoraConfig(rank=2, modules_to_save=("lm_head",), bias="lora_only"), base_name="a/base")
    adapter = injected.adapter()
    lf.save(adapter, tmp_path / "out")
    assert lf.content_id(lf.load(tmp_path / "out")) == lf.content_id(adapter)
    registry = lf.Registry(tmp_path / "store")
    registry.push(adapter, "made:v1")
    assert lf.content_id(registry.load("made:v1")) == lf.content_id(adapter)
    assert lf.load(tmp_path / "out").base.name == "a/base"


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("dropped", [0, 20_000])
def test_the_hand_written_backward_is_the_derivative(bias, start, dropped):
    torch.manual_seed(0)

    def random(*shape, grad=True):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)

    x, w, a, b = random(2, 3, 5), random(4, 5, grad=False), random(2, 5), random(4, 2)
    c = random(4) if bias else None
    first = (random(2, 5, grad=False), random(4, 2, grad=False)) if start else None
    form = Form(0.7, Dropout(dropped, seed=9) if dropped else None, torch.float64, torch.float64)

    def plain(x, a, b):
        z = x if form.dropout is None else x * form.dropout.mask(x, x.dtype) * form.dropout.gain
        y = nn.functional.linear(x, w, c) + 0.7 * z @ a.T @ b.T
        return y if first is None else y - 0.7 * x @ first[0].T @ first[1].T

    assert torch.allclose(lora_linear(form, x, w, c, a, b, first), plain(x, a, b), rtol=1e-12)
    arguments = (x, a, b) if c is None else (x, a, b, c)
    assert torch.autograd.gradcheck(lambda x, a, b, c=None: lora_linear(form, x, w, c, a, b, first), arguments)


def test_an_empty_input_gives_gradients_of_zero():
    """An expert that no token was sent to."""
    base = nn.ModuleDict({"layer": nn.Linear(4, 3)})
    injected = inject(base, LoraConfig(rank=2, targets=("layer",), dropout=0.1))
    base["layer"](torch.zeros(0, 4)).sum().backward()
    assert [float(p.grad.abs().sum()) for p in injected.parameters().values()] == [0.0, 0.0]
