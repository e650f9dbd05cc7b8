"""Layers: outputs and gradients are PEFT's in float64, for every kind and option that both have."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import loraforge as lf
from loraforge.errors import TargetError
from loraforge.layers import LoraConfig, attach, inject
from loraforge.layers import dropout as masks
from tests.conformance.peft_cases import CASES, lora_layers, make, write

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own remarks about its layers


class Chain(nn.Module):
    """Modules one after another, under their names."""

    def __init__(self, **children):
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x):
        for child in self.children():
            x = child(x)
        return x


def linear():
    return Chain(fc=nn.Linear(6, 8), act=nn.Tanh(), out=nn.Linear(8, 5, bias=False)), torch.randn(3, 4, 6)


def transposed():
    return Chain(c_fc=Conv1D(8, 6), act=nn.Tanh(), c_proj=Conv1D(5, 8)), torch.randn(3, 4, 6)


def embedding():
    tokens = torch.tensor([[1, 2, 3, 0], [0, 3, 9, 9]])
    return Chain(emb=nn.Embedding(10, 6, padding_idx=0), act=nn.Tanh(), fc=nn.Linear(6, 5)), tokens


def conv1d():
    return Chain(conv=nn.Conv1d(4, 6, 3, stride=2, padding=1), act=nn.Tanh()), torch.randn(2, 4, 9)


def conv2d():
    return Chain(conv=nn.Conv2d(4, 6, (3, 2), padding=(1, 0)), act=nn.Tanh()), torch.randn(2, 4, 5, 6)


def conv3d():
    return Chain(conv=nn.Conv3d(3, 4, 2, bias=False), act=nn.Tanh()), torch.randn(2, 3, 4, 4, 4)


def grouped():
    return Chain(conv=nn.Conv2d(4, 6, 3, groups=2), act=nn.Tanh()), torch.randn(2, 4, 5, 6)


KINDS = [linear, transposed, embedding, conv1d, conv2d, conv3d, grouped]
TARGETS = {
    linear: ("fc", "out"),
    transposed: ("c_fc", "c_proj"),
    embedding: ("emb", "fc"),
    conv1d: ("conv",),
    conv2d: ("conv",),
    conv3d: ("conv",),
    grouped: ("conv",),
}
OPTIONS = {
    "plain": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "lora_bias": {"lora_bias": True},
    "bias_all": {"bias": "all"},
    "bias_lora_only": {"bias": "lora_only"},
}
UNDEFINED = {("embedding", "lora_bias"), ("grouped", "dora")}


def filled(model, config, seed=1):
    """Our adapter in a copy of the model, with random factors."""
    ours = copy.deepcopy(model)
    injected = inject(ours, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(injected.parameters().items()):
            values = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.3
            parameter.copy_(values.abs() + 0.5 if "magnitude" in name else values)
    return ours, injected


def in_peft(model, injected, folder):
    """PEFT's model with the same adapter, from the files we save, and its trainable parameters by our keys."""
    from peft import PeftModel

    lf.save(injected.adapter(), folder)
    return PeftModel.from_pretrained(copy.deepcopy(model), str(folder), is_trainable=True, autocast_adapter_dtype=False)


def gradients(model, parameters, x, weights):
    """Loss, input gradient and parameter gradients of one fixed function of the output."""
    for parameter in parameters.values():
        parameter.grad = None
    x = x.detach().clone().requires_grad_(x.is_floating_point())
    y = model(x)
    (y * weights).sum().backward()
    found = {name: parameter.grad for name, parameter in parameters.items()}
    return y.detach(), {**found, **({"input": x.grad} if x.requires_grad else {})}


def their_parameters(theirs, injected):
    """Pair PEFT's parameters with ours by what they are."""
    names = {}
    for name, parameter in theirs.named_parameters():
        if not parameter.requires_grad:
            continue
        key = name.removeprefix("base_model.model.").replace(".default", "").replace(".modules_to_save", "")
        for theirs_end, ours_end in (
            (".lora_A.weight", ".lora.a"),
            (".lora_B.weight", ".lora.b"),
            (".lora_B.bias", ".lora.bias"),
            (".lora_embedding_A", ".lora.a"),
            (".lora_embedding_B", ".lora.b"),
            (".lora_magnitude_vector.weight", ".lora.magnitude"),
        ):
            key = key.replace(theirs_end, ours_end)
        names[key] = parameter
    assert names.keys() == injected.parameters().keys()
    return names


def distance(ours, theirs):
    """The largest relative difference of two sets of gradients."""
    assert ours.keys() == theirs.keys()
    worst = 0.0
    for name, mine in ours.items():
        other = theirs[name].reshape(mine.shape)
        assert float(other.norm()) > 0, f"{name} has no gradient, so this shows nothing"
        worst = max(worst, float((mine - other).norm() / other.norm()))
    return worst


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_outputs_and_gradients_are_pefts(kind, option, tmp_path):
    if (kind.__name__, option) in UNDEFINED:
        with pytest.raises(lf.LoraforgeError):
            inject(kind()[0], LoraConfig(2, targets=TARGETS[kind], **OPTIONS[option]))
        return
    torch.manual_seed(0)
    model, x = kind()
    model, x = model.double(), x.double() if x.is_floating_point() else x
    config = LoraConfig(rank=2, alpha=3, targets=TARGETS[kind], **OPTIONS[option])
    ours, injected = filled(model, config)
    if option.startswith("bias") and not any("bias" in name for name in injected.parameters()):
        assert kind is conv3d  # has no bias to train
        return
    theirs = in_peft(model, injected, tmp_path / "adapter")
    weights = torch.randn_like(ours(x).detach())
    y, mine = gradients(ours, injected.parameters(), x, weights)
    other_y, other = gradients(theirs, their_parameters(theirs, injected), x, weights)
    assert float((y - other_y).norm() / other_y.norm()) < 1e-12
    assert distance(mine, other) < 1e-10


@pytest.mark.parametrize("option", ["plain", "dora"])
@pytest.mark.parametrize("kind", [linear, transposed, conv2d], ids=lambda kind: kind.__name__)
def test_gradients_under_dropout_are_pefts_with_the_same_mask(kind, option, tmp_path):
    class Same(nn.Module):
        """PEFT's dropout, with the mask that ours drew for the same layer."""

        def __init__(self, dropout):
            super().__init__()
            self.dropout = dropout

        def forward(self, x):
            return x * self.dropout.mask(x, x.dtype) * self.dropout.gain

    torch.manual_seed(0)
    model, x = kind()
    model, x = model.double().train(), x.double()
    config = LoraConfig(rank=2, alpha=3, targets=TARGETS[kind], dropout=0.4, **OPTIONS[option])
    ours, injected = filled(model, config)
    theirs = in_peft(model, injected, tmp_path / "adapter").train()
    weights = torch.randn_like(ours(x).detach())
    torch.manual_seed(5)
    drawn = [masks.draw(0.4) for _ in TARGETS[kind]]
    for name, dropout in zip(TARGETS[kind], drawn, strict=True):
        theirs.base_model.model.get_submodule(name).lora_dropout["default"] = Same(dropout)
    torch.manual_seed(5)
    y, mine = gradients(ours, injected.parameters(), x, weights)
    other_y, other = gradients(theirs, their_parameters(theirs, injected), x, weights)
    assert float((y - other_y).norm() / other_y.norm()) < 1e-12
    assert distance(mine, other) < 1e-10
    assert not torch.equal(y, ours.eval()(x)), "nothing was dropped, so this shows nothing"


def test_patterns_and_saved_modules_on_a_llama_are_pefts(tmp_path):
    torch.manual_seed(0)
    model = make.llama()().double()
    config = LoraConfig(
        rank=4,
        alpha=6,
        targets="all-linear",
        rank_pattern={"q_proj": 2, "mlp.up_proj": 3},
        alpha_pattern={"v_proj": 9},
        modules_to_save=("norm", "lm_head"),
        task_type="CAUSAL_LM",
    )
    ours, injected = filled(model, config)
    theirs = in_peft(model, injected, tmp_path / "adapter")
    tokens = torch.randint(32, (2, 7))
    found = []
    for one, parameters in ((ours, injected.parameters()), (theirs, their_parameters(theirs, injected))):
        loss = one(input_ids=tokens, labels=tokens).loss
        loss.backward()
        found.append((float(loss.detach()), {name: parameter.grad for name, parameter in parameters.items()}))
    assert abs(found[0][0] - found[1][0]) < 1e-12
    assert distance(found[0][1], found[1][1]) < 1e-10


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_factorised_starts_train_as_pefts_on_its_residual_base(init, tmp_path):
    torch.manual_seed(0)
    model, x = linear()
    model, x = model.double(), x.double()
    ours = copy.deepcopy(model)
    injected = inject(ours, LoraConfig(rank=2, alpha=3, targets=("fc", "out"), init=init))
    residual = copy.deepcopy(model)  # what PEFT makes of the base
    factors = {}
    for name in ("fc", "out"):
        lora = ours.get_submodule(name).lora
        with torch.no_grad():
            residual.get_submodule(name).weight -= lora.scale * lora.b @ lora.a
        factors[name] = lf.LowRank("linear", lora.a.detach().clone(), lora.b.detach().clone(), lora.alpha)
    from peft import PeftModel

    lf.save(lf.Adapter(factors), tmp_path / "start")
    theirs = PeftModel.from_pretrained(residual, str(tmp_path / "start"), is_trainable=True)
    weights = torch.randn(3, 4, 5, dtype=torch.float64)
    y, mine = gradients(ours, injected.parameters(), x, weights)
    other_y, other = gradients(theirs, their_parameters(theirs, injected), x, weights)
    assert float((y - other_y).norm() / other_y.norm()) < 1e-12
    assert float((y - model(x)).norm() / y.norm()) < 1e-12, "training starts at the base"
    assert distance(mine, other) < 1e-10


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_factorised_starts_are_pefts(init):
    from peft import LoraConfig as TheirConfig
    from peft import get_peft_model

    torch.manual_seed(0)
    model, _ = linear()
    ours = copy.deepcopy(model)
    inject(ours, LoraConfig(rank=2, alpha=3, targets=("fc", "out"), init=init))
    theirs = get_peft_model(
        copy.deepcopy(model), TheirConfig(r=2, lora_alpha=3, target_modules=["fc", "out"], init_lora_weights=init)
    )
    for name in ("fc", "out"):
        mine, other = ours.get_submodule(name).lora, theirs.base_model.model.get_submodule(name)
        product = other.lora_B["default"].weight @ other.lora_A["default"].weight
        assert torch.allclose(mine.b @ mine.a, product, atol=1e-6)


def test_a_factorised_start_is_exported_as_a_plain_adapter_that_peft_computes_alike(tmp_path):
    torch.manual_seed(0)
    model, x = linear()
    model, x = model.double(), x.double()
    for rslora in (False, True):
        config = LoraConfig(rank=2, alpha=3, targets=("fc", "out"), init="pissa", rslora=rslora)
        ours, injected = filled(model, config)
        adapter = injected.adapter()
        assert {pair.rank for pair in adapter.targets.values()} == {4}
        theirs = in_peft(model, injected, tmp_path / f"adapter-{rslora}")
        assert torch.allclose(ours(x), theirs(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("option", ["plain", "dora", "bias_all"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_an_adapter_attached_is_the_adapter_exported(kind, option):
    if (kind.__name__, option) in UNDEFINED:
        return
    torch.manual_seed(0)
    model, x = kind()
    ours, injected = filled(model, LoraConfig(2, 3, TARGETS[kind], **OPTIONS[option]))
    adapter = injected.adapter()
    other = copy.deepcopy(model)
    again = attach(other, adapter)
    assert torch.equal(other(x), ours(x))
    assert lf.content_id(again.adapter()) == lf.content_id(adapter)
    half = replace(adapter, targets={n: replace(p, a=p.a.half(), b=p.b.half()) for n, p in adapter.targets.items()})
    again.remove()
    used = attach(other, half, trainable=False)
    assert not any(parameter.requires_grad for parameter in other.parameters())
    assert lf.content_id(used.adapter()) == lf.content_id(half)


REFUSED = {"trainable_tokens", "trainable_tokens_tied", "everything_along", "tied_and_ensured"}
"""Trained rows of the base's embedding, and a target whose weight another module has too."""


def example(module):
    """An input that a module takes."""
    generator = torch.Generator().manual_seed(4)
    if isinstance(module, nn.Embedding):
        return torch.randint(module.num_embeddings, (3, 5), generator=generator)
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return torch.randn(2, module.in_channels, *[7] * (module.weight.ndim - 2), generator=generator)
    width = module.weight.shape[0] if isinstance(module, Conv1D) else module.in_features
    return torch.randn(3, 4, width, generator=generator)


@pytest.mark.parametrize("name", CASES)
def test_what_peft_saved_computes_in_our_layers_what_it_does_in_pefts(name, tmp_path):
    written = write(CASES[name], tmp_path / "theirs")
    ours, adapter = copy.deepcopy(written.base), lf.load(written.folder)
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    if name in REFUSED:
        with pytest.raises(TargetError, match=r"rewrites weights of the base|shares its weight"):
            attach(ours, adapter, trainable=False)
        return
    injected = attach(ours, adapter, trainable=False)
    theirs = written.model.eval()
    compared = 0
    for path, layer in lora_layers(theirs):
        module = ours.get_submodule(path).eval()
        x = example(module)
        x = x if not x.is_floating_point() else x.to(module.weight.dtype)
        with torch.no_grad():
            mine, other = module(x), layer(x)
        assert mine.dtype == other.dtype
        bound = 1e-12 if mine.dtype == torch.float64 else 1e-5 if mine.dtype == torch.float32 else 2e-2
        assert float((mine.double() - other.double()).norm() / other.double().norm()) < bound, path
        compared += 1
    assert compared == len(adapter.targets)
    assert lf.content_id(injected.adapter()) == lf.content_id(adapter)
    injected.remove()
    assert all(torch.equal(value, before[key]) for key, value in ours.state_dict().items())
