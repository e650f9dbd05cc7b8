"""Merged by us and by PEFT: whole models that transformers loads, every kind of layer, bits, ties, and the way back."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import loraforge as lf
from loraforge.checkpoint import output
from loraforge.errors import CompositionError
from tests.checkpoints import NAMES, assert_same, raw, read_tensors
from tests.conformance.peft_cases import CASES, VECTORS, lora_layers, make, write
from tests.rationals import rounded_once

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's and transformers' own remarks about their layers


@pytest.fixture(autouse=True)
def _not_durable(monkeypatch):
    """Nothing here dies in between, and waiting for the disk would take most of the time."""
    monkeypatch.setattr(output.os, "fsync", lambda _: None)


VERSIONS = sorted(path.name for path in VECTORS.iterdir() if path.is_dir())
NEWEST = VERSIONS[-1]


def save_state(model, folder):
    """Save a model's state dict as the checkpoint of a base."""
    folder.mkdir(parents=True)
    state = {name: tensor.detach().clone().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    return folder


def trained(base, folder, seed=0, std=0.05, **config):
    """Let PEFT write an adapter with random values for a model, and return the folder."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(copy.deepcopy(base).float(), LoraConfig(**config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
                if "magnitude" in name:
                    parameter.abs_().add_(0.5)
    model.save_pretrained(str(folder))
    return folder


def in_peft(base, *folders):
    """Load adapters onto a copy of the base, with the values that their files have."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(copy.deepcopy(base), str(folders[0]), adapter_name="0")
    for number, folder in enumerate(folders[1:], 1):
        model.load_adapter(str(folder), str(number))
    return model


def weights_in_peft(model):
    return {f"{path}.weight": layer.base_layer.weight.detach().clone() for path, layer in lora_layers(model)}


# --- PEFT's arithmetic, to the bit ------------------------------------------------------------------------------------

LAYERS = {
    "linear": lambda: nn.Linear(700, 300),
    "conv1d_gpt2": lambda: make.Conv1D(300, 500),
    "embedding": lambda: nn.Embedding(900, 64),
    "conv1d": lambda: nn.Conv1d(32, 48, 3),
    "conv2d": lambda: nn.Conv2d(32, 48, (3, 2)),
    "conv2d, one by one": lambda: nn.Conv2d(64, 48, 1),
    "conv3d": lambda: nn.Conv3d(16, 24, (1, 2, 3)),
    # as the last piece of a tensor that is read in pieces, a few rows
    "linear, a shorter last piece": lambda: nn.Linear(4100, 64),
    "linear, a short last piece": lambda: nn.Linear(4096, 130),
    "conv1d_gpt2, a short last piece": lambda: make.Conv1D(3072, 768),
}
OPTIONS = {
    "plain": {"r": 8, "lora_alpha": 12},
    "rank 1": {"r": 1, "lora_alpha": 3},
    "rslora": {"r": 16, "lora_alpha": 5, "use_rslora": True},
    "patterns": {"r": 4, "lora_alpha": 4, "rank_pattern": {"m": 6}, "alpha_pattern": {"m": 7}},
}


def model_of(layer, dtype):
    torch.manual_seed(7)
    return nn.ModuleDict({"m": LAYERS[layer]()}).to(dtype)


def options_of(layer, name):
    return {"target_modules": ["m"], "fan_in_fan_out": layer.startswith("conv1d_gpt2"), **OPTIONS[name]}


def assert_merges_as_peft(layer, dtype, configs, home):
    base = model_of(layer, dtype)
    folders = [trained(base, home / str(number), seed=number, **config) for number, config in enumerate(configs)]
    theirs = in_peft(base, *folders)
    for number, folder in enumerate(folders):
        held = {name: p for name, p in theirs.named_parameters() if f".{number}" in name}
        for name, tensor in load_file(folder / "adapter_model.safetensors").items():
            found = [p for n, p in held.items() if n.replace(f".{number}", "") == name]
            assert len(found) == 1
            assert torch.equal(found[0], tensor), "PEFT merges other numbers than the file has"
    theirs.merge_adapter([str(number) for number in range(len(folders))])
    lf.merge(save_state(base, home / "base"), folders, home / "ours", compute="float32")
    ours = read_tensors(home / "ours")
    assert_same({"m.weight": ours["m.weight"]}, weights_in_peft(theirs))
    lf.unmerge(home / "ours", home / "back", adapters=folders)
    assert_same(read_tensors(home / "back"), dict(base.state_dict()))


def in_16_bit(layer):
    return layer != "embedding"  # PEFT rounds an embedding's factors to the base's type before it merges them


SHORT_PIECES = [layer for layer in LAYERS if "piece" in layer]
BITS = [
    (layer, dtype)
    for layer in LAYERS
    for dtype in ("bf16", "fp16", "fp32")
    if layer not in SHORT_PIECES and (dtype == "fp32" or in_16_bit(layer))
]


@pytest.mark.parametrize(("layer", "dtype"), BITS)
@pytest.mark.parametrize("options", OPTIONS)
def test_pefts_arithmetic_to_the_bit(layer, dtype, options, tmp_path):
    assert_merges_as_peft(layer, NAMES[dtype], [options_of(layer, options)], tmp_path)


@pytest.mark.parametrize(("layer", "dtype"), [*BITS, *((name, "fp64") for name in LAYERS if name not in SHORT_PIECES)])
def test_pefts_arithmetic_one_after_the_other(layer, dtype, tmp_path):
    configs = [options_of(layer, name) for name in ("plain", "rslora", "patterns")]
    assert_merges_as_peft(layer, NAMES[dtype], configs, tmp_path)


@pytest.mark.parametrize("layer", SHORT_PIECES)
def test_pefts_arithmetic_of_a_tensor_in_uneven_pieces(layer, tmp_path):
    assert_merges_as_peft(layer, torch.float32, [{**options_of(layer, "plain"), "r": 16}], tmp_path)


# --- the real number, rounded once ------------------------------------------------------------------------------------

ADDITIVE = [
    name
    for name, case in CASES.items()
    if case.base_name is None
    and name != "conv2d_grouped"
    and not {"use_dora", "modules_to_save", "trainable_token_indices", "bias"} & set(case.lora)
]


def seen_as_a_sum(adapter, target, weight_shape, coefficient):
    """The factors (b, a) of a target's update in the base's orientation; c B is rounded to float64 once."""
    pair = adapter.targets[target]
    a, b = pair.a.double().flatten(1), pair.b.double().flatten(1)
    turned = pair.kind == "embedding" or adapter.settings.fan_in_fan_out
    b, a = (a.T, b.T) if turned else (b, a)
    assert (b.shape[0], a.shape[1]) == (weight_shape[0], weight_shape[1:].numel())
    scale = pair.alpha / (pair.rank**0.5 if pair.rslora else pair.rank)
    return (coefficient * scale) * b, a


@pytest.mark.parametrize("name", ADDITIVE)
@pytest.mark.parametrize("dtype", NAMES)
def test_exact_is_the_real_sum_rounded_once(name, dtype, tmp_path):
    case, dtype = CASES[name], NAMES[dtype]
    written = [write(case, tmp_path / f"adapter {seed}", seed=seed) for seed in range(2)]
    base = written[0].base.to(dtype)
    coefficients = (0.7, -1.25)
    given = list(zip([item.folder for item in written], coefficients, strict=True))
    lf.merge(save_state(base, tmp_path / "base"), given, tmp_path / "ours")
    ours, adapters = read_tensors(tmp_path / "ours"), [lf.load(item.folder) for item in written]
    for target in adapters[0].targets:
        weight = base.state_dict()[f"{target}.weight"]
        parts = [seen_as_a_sum(x, target, weight.shape, c) for x, c in zip(adapters, coefficients, strict=True)]
        b, a = torch.cat([b for b, _ in parts], dim=1), torch.cat([a for _, a in parts])
        expected = rounded_once(weight.double().flatten(1), b, a, dtype)
        assert raw(ours[f"{target}.weight"]) == raw(expected), target
        if adapters[0].targets[target].bias is not None:
            scales = [c * x.targets[target].scale for x, c in zip(adapters, coefficients, strict=True)]
            b = torch.cat(
                [s * x.targets[target].bias.double()[:, None] for s, x in zip(scales, adapters, strict=True)], 1
            )
            before = base.state_dict()[f"{target}.bias"].double()[:, None]
            expected = rounded_once(before, b, torch.ones(2, 1, dtype=torch.float64), dtype)
            assert raw(ours[f"{target}.bias"]) == raw(expected), target


TRUTHS = sorted(path.parent.name for path in VECTORS.glob(f"{NEWEST}/*/merged.safetensors"))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", TRUTHS)
def test_what_every_peft_wrote_gives_what_the_newest_merges(name, version, tmp_path):
    folder, truth = VECTORS / version / name, VECTORS / NEWEST / name
    if not folder.exists() or (name == "bias_lora_only" and version != NEWEST):
        pytest.skip(f"PEFT {version} does not save all of {name}")
    lf.merge(truth / "base.safetensors", folder, tmp_path / "ours")
    ours = load_file(tmp_path / "ours" / "base.safetensors")
    theirs = load_file(truth / "merged.safetensors")
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        # the goldens' values are multiples of 1/32, so what only adds and replaces is exact in both
        limit = 4 * torch.finfo(torch.float32).eps if "dora" in name else 0.0
        assert torch.allclose(ours[key], tensor, rtol=limit, atol=limit), key
    lf.unmerge(tmp_path / "ours", tmp_path / "back", adapters=[folder])
    assert (tmp_path / "back" / "base.safetensors").read_bytes() == (truth / "base.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize("name", sorted(name for name in CASES if "dora" in name))
def test_dora_is_pefts_within_some_units(name, dtype, tmp_path):
    """In float32 where PEFT is given float32; the shorter types against PEFT's float32, which they round once."""
    dtype = NAMES[dtype]
    written = write(CASES[name], tmp_path / "adapter")
    base = copy.deepcopy(written.base).to(dtype)
    lf.merge(save_state(base, tmp_path / "base"), written.folder, tmp_path / "ours")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    theirs = in_peft(copy.deepcopy(base).to(wide), written.folder).merge_and_unload().state_dict()
    for key, tensor in read_tensors(tmp_path / "ours").items():
        # float32 factors and norms in both; half a unit of the type for the rounding
        limit = 8 * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps / 2
        assert ((tensor.double() - theirs[key].double()).abs() <= limit * theirs[key].double().abs() + 1e-7).all(), key
    lf.unmerge(tmp_path / "ours", tmp_path / "back", adapters=[written.folder])
    assert_same(read_tensors(tmp_path / "back"), dict(base.state_dict()))


# --- models that transformers loads -----------------------------------------------------------------------------------


def llama(dtype=torch.float32, **options):
    torch.manual_seed(3)
    return make.llama(num_hidden_layers=2, **options)().to(dtype).eval()


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(3)
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2)).eval()


def logits(model):
    tokens = torch.arange(24).reshape(3, 8)
    with torch.no_grad():
        return model(input_ids=tokens).logits


def reloaded(model, folder, **options):
    found, told = type(model).from_pretrained(str(folder), output_loading_info=True, dtype="auto", **options)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    return found.eval()


MODELS = {
    "llama": (llama, {"target_modules": "all-linear", "r": 4}),
    "llama, tied": (lambda: llama(tie_word_embeddings=True), {"target_modules": ["q_proj", "down_proj"], "r": 3}),
    "llama, embeddings": (llama, {"target_modules": ["embed_tokens", "lm_head", "v_proj"], "r": 2}),
    "llama, saved head": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "r": 2}),
    "llama, tokens": (llama, {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5, 9], "r": 2}),
    "llama, dora": (llama, {"target_modules": ["q_proj", "up_proj"], "use_dora": True, "r": 2}),
    "gpt2": (gpt2, {"target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True, "r": 4}),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shards", ["1GB", "4KB"])
def test_a_merged_model_answers_as_pefts_does(name, shards, tmp_path):
    build, config = MODELS[name]
    base = build()
    base.save_pretrained(tmp_path / "base", max_shard_size=shards)
    assert (tmp_path / "base" / "model.safetensors").exists() == (shards == "1GB")
    folder = trained(base, tmp_path / "adapter", lora_alpha=6, std=0.2, **config)
    theirs = logits(in_peft(base, folder).merge_and_unload())
    lf.merge(tmp_path / "base", folder, tmp_path / "merged")
    ours = logits(reloaded(base, tmp_path / "merged"))
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(ours, logits(base), rtol=1e-2, atol=1e-3)
    lf.unmerge(tmp_path / "merged", tmp_path / "back", adapters=[folder])
    for path in (tmp_path / "base").iterdir():
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("shards", ["1GB", "4KB"])
def test_saved_again_by_transformers(shards, tmp_path):
    base = llama(torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    folder = trained(base, tmp_path / "adapter", lora_alpha=6, r=4, target_modules="all-linear")
    lf.merge(tmp_path / "base", folder, tmp_path / "merged")
    reloaded(base, tmp_path / "merged").save_pretrained(tmp_path / "again", max_shard_size=shards)
    receipt = tmp_path / "merged" / "loraforge.receipt"
    lf.unmerge(tmp_path / "again", tmp_path / "back", adapters=[folder], receipt=receipt)
    assert_same(read_tensors(tmp_path / "back"), read_tensors(tmp_path / "base"))


def test_a_base_saved_without_its_head(tmp_path):
    """Names lose their first component there; the adapter keeps it."""
    base = gpt2()
    folder = trained(base, tmp_path / "adapter", lora_alpha=6, r=4, target_modules=["c_attn"], fan_in_fan_out=True)
    base.transformer.save_pretrained(tmp_path / "bare")
    base.save_pretrained(tmp_path / "whole")
    lf.merge(tmp_path / "bare", folder, tmp_path / "merged bare")
    lf.merge(tmp_path / "whole", folder, tmp_path / "merged whole")
    bare, whole = (read_tensors(tmp_path / f"merged {name}") for name in ("bare", "whole"))
    assert_same({f"transformer.{name}": tensor for name, tensor in bare.items()}, whole)


# --- tied embeddings --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("how", ["target_modules", "modules_to_save"])
def test_one_of_two_tied_embeddings_is_refused(target, how, tmp_path):
    base = llama(tie_word_embeddings=True)
    base.save_pretrained(tmp_path / "base")
    config = {"target_modules": ["q_proj"], "r": 2, "lora_alpha": 4}
    config[how] = [*config.get(how, []), target]
    folder = trained(base, tmp_path / "adapter", **config)
    with pytest.raises(CompositionError, match=rf"{target}'.*tie_word_embeddings.*untie the base first"):
        lf.merge(tmp_path / "base", folder, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj"], "trainable_token_indices": [0, 3, 30]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ],
    ids=["both targeted", "token rows", "both saved"],
)
def test_two_that_are_changed_alike_are_written_once(config, tmp_path):
    """PEFT's own merge adds to the one weight twice; what counts is how the adapted model answers."""
    base = llama(tie_word_embeddings=True)
    base.save_pretrained(tmp_path / "base")
    folder = trained(base, tmp_path / "adapter", r=2, lora_alpha=4, **config)
    active = in_peft(base, folder)
    kept, expected = logits(base), logits(active)
    lf.merge(tmp_path / "base", folder, tmp_path / "merged")
    ours = logits(reloaded(base, tmp_path / "merged"))
    assert torch.allclose(ours, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(ours, kept, rtol=1e-2, atol=1e-3)
    lf.unmerge(tmp_path / "merged", tmp_path / "back", adapters=[folder])
    assert_same(read_tensors(tmp_path / "back"), read_tensors(tmp_path / "base"))


def test_embeddings_may_be_weighted(tmp_path):
    """Their update is a sum like any other."""
    base = llama()
    base.save_pretrained(tmp_path / "base")
    folder = trained(base, tmp_path / "adapter", r=2, lora_alpha=4, target_modules=["embed_tokens"])
    lf.merge(tmp_path / "base", [(folder, 0.5)], tmp_path / "merged")


def test_a_base_that_is_not_tied_takes_either(tmp_path):
    base = llama(tie_word_embeddings=False)
    base.save_pretrained(tmp_path / "base")
    for number, target in enumerate(("embed_tokens", "lm_head")):
        folder = trained(base, tmp_path / target, r=2, lora_alpha=4, target_modules=[target])
        lf.merge(tmp_path / "base", folder, tmp_path / f"merged {number}")
        ours = logits(reloaded(base, tmp_path / f"merged {number}"))
        assert torch.allclose(ours, logits(in_peft(base, folder)), rtol=1e-5, atol=1e-6)


def test_a_config_that_says_nothing_means_tied_where_no_head_is_stored(tmp_path):
    """As transformers reads it."""
    base = llama(tie_word_embeddings=True)
    base.save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    del config["tie_word_embeddings"]
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    folder = trained(base, tmp_path / "adapter", r=2, lora_alpha=4, target_modules=["embed_tokens"])
    with pytest.raises(CompositionError, match="tie_word_embeddings"):
        lf.merge(tmp_path / "base", folder, tmp_path / "merged")


# --- and back ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("layer", ["linear", "conv1d_gpt2", "embedding", "conv2d"])
def test_peft_does_not_come_back_and_we_do(layer, dtype, tmp_path):
    base = model_of(layer, NAMES[dtype])
    folder = trained(base, tmp_path / "adapter", std=0.02, **options_of(layer, "plain"))
    before = {"m.weight": base["m"].weight.detach().clone()}
    theirs = in_peft(base, folder)
    theirs.merge_adapter()
    theirs.unmerge_adapter()
    wrong = weights_in_peft(theirs)["m.weight"] != before["m.weight"]
    assert wrong.double().mean() > 1e-3
    for compute in ("exact", "float32"):
        home = tmp_path / compute
        lf.merge(save_state(base, home / "base"), folder, home / "merged", compute=compute)
        lf.unmerge(home / "merged", home / "back", adapters=[folder])
        assert raw(read_tensors(home / "back")["m.weight"]) == raw(before["m.weight"])
