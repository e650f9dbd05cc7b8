"""Extraction against planted updates, dense decompositions, and PEFT."""

import json
import math
import os
import warnings

import pytest
import torch
from safetensors.torch import save_file

import loraforge as lf
from loraforge.checkpoint.noise import Squares, edge_of, rounding_noise, squares
from loraforge.checkpoint.reader import open_checkpoint
from loraforge.checkpoint.receipt import checkpoint_digest
from loraforge.errors import CompositionError, FormatError, NotFoundError, NumericalError
from loraforge.formats import peft as peft_format
from loraforge_registry.digest import Digest
from loraforge_registry.ingest import TensorHasher
from loraforge_registry.objects import read_chunks

os.environ["HF_HUB_OFFLINE"] = "1"

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
NORM, EMBED = "model.norm", "model.embed_tokens"


def normal(*shape, seed=0, std=0.02):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * std


def update(m, n, rank, size, seed=9):
    """A matrix of this rank and root mean square."""
    dense = normal(m, rank, seed=seed) @ normal(rank, n, seed=seed + 1)
    return dense * (size * math.sqrt(m * n) / dense.norm())


def base_tensors(dtype=torch.bfloat16):
    found = {
        f"{Q}.weight": normal(160, 96, seed=1),
        f"{DOWN}.weight": normal(96, 200, seed=2),
        f"{NORM}.weight": torch.ones(96),
        f"{EMBED}.weight": normal(50, 96, seed=3),
    }
    return {name: tensor.to(dtype) for name, tensor in found.items()}


def changed(tensors, size=0.002, rank=3, **whole):
    """The same with low-rank updates of both matrices, and with ``whole`` tensors instead of their namesakes."""
    found = dict(tensors)
    for seed, name in ((10, f"{Q}.weight"), (20, f"{DOWN}.weight")):
        dense = update(*found[name].shape, rank, size, seed)
        found[name] = (found[name].float() + dense).to(found[name].dtype)
    return found | whole


def write(folder, tensors, config=None):
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def extract(tmp_path):
    """Write two checkpoints and extract."""

    def run(before, after, config=None, **options):
        base, finetuned = write(tmp_path / "base", before, config), write(tmp_path / "finetuned", after, config)
        options = options if {"rank", "energy"} & set(options) else {"auto": True, **options}
        return lf.extract(base, finetuned, **options)

    return run


def one(weight, new):
    return {"layer.weight": weight}, {"layer.weight": new}


@pytest.mark.parametrize(("m", "n", "rank"), [(512, 768, 8), (700, 512, 32), (1024, 640, 64)])
@pytest.mark.parametrize("uneven", [0.0, 0.5])
def test_auto_finds_the_planted_rank_in_bfloat16_and_takes_noise_out(extract, m, n, rank, uneven):
    """Also where the sizes of rows and columns vary, and the noise with them."""
    sizes = torch.exp(uneven * normal(m, 1, seed=4, std=1)) * torch.exp(uneven * normal(1, n, seed=5, std=1))
    weight = (normal(m, n, seed=1) * sizes).bfloat16()
    planted = update(m, n, rank, 0.01 * float(weight.float().norm()) / math.sqrt(m * n))
    new = (weight.float() + planted).bfloat16()
    found = extract(*one(weight, new))
    report = found.report.targets["layer"]
    assert report.rank == rank
    raw = float((new.float() - weight.float() - planted).norm() / planted.norm())
    ours = float((found.adapter.targets["layer"].delta() - planted).norm() / planted.norm())
    assert ours < raw / 1.5
    assert report.noise == pytest.approx(raw**2 / (1 + raw**2), rel=0.2)


@pytest.mark.parametrize("size", [0.03, 0.003, 0.001])
def test_auto_finds_updates_far_below_an_ulp(extract, size):
    weight = normal(800, 900).bfloat16()
    new = (weight.float() + update(800, 900, 8, size * 0.02)).bfloat16()
    report = extract(*one(weight, new)).report.targets["layer"]
    assert report.rank == 8
    assert 0 < report.noise < 1


def test_auto_keeps_one_direction_of_noise_alone(extract):
    weight = normal(300, 200)
    report = extract(*one(weight, weight.bfloat16())).report.targets["layer"]
    assert report.rank == 1
    assert report.noise == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [1, 5, 40])
def test_the_error_is_that_of_the_best_approximation_and_of_the_factors(extract, dtype, rank):
    weight = normal(240, 180).to(dtype)
    s = torch.logspace(0, -2, 180).double()
    new = (weight.double() + svd_of(s, 240, 180) * 0.05).to(dtype)
    found = extract(*one(weight, new), rank=rank)
    report, pair = found.report.targets["layer"], found.adapter.targets["layer"]
    d = new.double() - weight.double()
    best = torch.linalg.svdvals(d)
    assert report.error == pytest.approx(float(best[rank:].norm() / best.norm()), rel=1e-3)
    assert report.error == pytest.approx(float((pair.delta() - d).norm() / d.norm()), rel=1e-4)
    assert report.captured == pytest.approx(1 - report.error**2, abs=1e-5)
    assert report.norm == pytest.approx(float(d.norm()), rel=1e-6)
    assert report.spectrum[:rank] == pytest.approx(best[:rank].tolist(), rel=1e-3)
    assert (pair.rank, pair.alpha, pair.scale) == (rank, rank, 1.0)
    assert pair.a.dtype == pair.b.dtype == torch.float32
    assert torch.allclose(pair.a.norm(dim=1), pair.b.norm(dim=0), rtol=1e-4)
    assert bool((pair.b.gather(0, pair.b.abs().argmax(0, keepdim=True)) > 0).all())


def svd_of(s, m, n):
    u = torch.linalg.qr(normal(m, len(s), seed=6).double())[0]
    v = torch.linalg.qr(normal(n, len(s), seed=7).double())[0]
    return (u * s) @ v.T


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.97])
def test_energy_is_the_smallest_rank_that_holds_the_share(extract, energy):
    weight = normal(300, 260).bfloat16()
    new = (weight.double() + svd_of(torch.logspace(0, -2, 260).double(), 300, 260)).bfloat16()
    report = extract(*one(weight, new), energy=energy).report.targets["layer"]
    share = torch.linalg.svdvals(new.double() - weight.double()).square().cumsum(0)
    share = share / share[-1]
    assert report.rank == int((share < energy).sum()) + 1
    assert report.captured >= energy


def test_energy_that_takes_too_much_stops_at_max_rank(extract):
    weight = normal(200, 150)
    report = extract(*one(weight, weight + normal(200, 150, seed=8)), energy=0.99, max_rank=20).report
    assert report.targets["layer"].rank == 20
    assert report.captured < 0.99


def test_an_exact_update_is_found_to_the_last_bits(extract):
    before = base_tensors(torch.float32)
    found = extract(before, changed(before), rank=16)
    assert {t.rank for t in found.report.targets.values()} == {3}
    assert found.report.error < 1e-5


def test_the_sketch_is_the_same_every_time(extract):
    before, after = base_tensors(), changed(base_tensors())
    first, again = extract(before, after, rank=2), extract(before, after, rank=2)
    assert first.report == again.report
    assert lf.content_id(first.adapter) == lf.content_id(again.adapter)
    other = extract(before, after, rank=2, seed=1).adapter.targets[Q]
    assert torch.allclose(other.delta(), first.adapter.targets[Q].delta(), atol=1e-5)


def test_equal_tensors_are_skipped(extract):
    before = base_tensors()
    after = changed(before) | {f"{DOWN}.weight": before[f"{DOWN}.weight"]}
    found = extract(before, after)
    assert list(found.adapter.targets) == [Q]
    assert (found.report.unchanged, found.report.saved, found.report.left_out) == (3, (), {})


def test_types_may_differ_and_equal_numbers_are_no_change(extract):
    before = base_tensors()
    after = {name: tensor.float() for name, tensor in changed(before).items()}
    found = extract(before, after, rank=3)
    assert (set(found.adapter.targets), found.report.saved) == ({Q, DOWN}, ())


def test_two_equal_checkpoints_have_nothing_to_extract(extract):
    with pytest.raises(CompositionError, match="nothing to extract"):
        extract(base_tensors(), base_tensors())


MORE = {f"{NORM}.weight": torch.full((96,), 1.5).bfloat16(), f"{EMBED}.weight": normal(50, 96, seed=33).bfloat16()}


def test_what_no_lora_can_hold_must_be_saved_or_dropped(extract):
    before, after = base_tensors(), changed(base_tensors(), **MORE)
    with pytest.raises(
        CompositionError, match=r"'model.embed_tokens.weight', 'model.norm.weight' changed.*save 'auto'"
    ):
        extract(before, after)
    with pytest.raises(CompositionError, match=r"^'model.norm.weight' changed"):
        extract(before, after, save=["embed_tokens"])
    whole = extract(before, after, save="auto")
    assert whole.report.saved == (f"{EMBED}.weight", f"{NORM}.weight")
    assert whole.adapter.settings.modules_to_save == (EMBED, NORM)
    assert all(torch.equal(whole.adapter.extras[name], tensor) for name, tensor in MORE.items())
    none = extract(before, after, save="none")
    assert set(none.report.left_out) == set(MORE)
    assert none.report.left_out[f"{NORM}.weight"] == pytest.approx(0.5 * math.sqrt(96))
    some = extract(before, after, save=["norm"], drop=["embed_tokens"])
    assert (set(some.adapter.extras), set(some.report.left_out)) == ({f"{NORM}.weight"}, {f"{EMBED}.weight"})
    assert some.report.as_record()["left_out"] == f"{EMBED}.weight"


def test_a_target_can_be_saved_whole_or_dropped(extract):
    before, after = base_tensors(), changed(base_tensors())
    assert set(extract(before, after, save=["q_proj"]).adapter.extras) == {f"{Q}.weight"}
    dropped = extract(before, after, drop=["mlp.down_proj"])
    assert list(dropped.adapter.targets) == [Q]
    assert dropped.report.left_out[f"{DOWN}.weight"] == pytest.approx(0.002 * math.sqrt(96 * 200), rel=0.05)


def test_a_name_that_matches_nothing_is_a_mistake(extract):
    for option in ({"save": ["nrom"]}, {"drop": ["nrom"]}, {"drop": ["orm"]}):
        with pytest.raises(CompositionError, match="is the end of no module's"):
            extract(base_tensors(), changed(base_tensors()), **option)
    with pytest.raises(CompositionError, match="expected 'auto', 'none' or a list"):
        extract(base_tensors(), changed(base_tensors()), save="norm")
    with pytest.raises(CompositionError, match="expected a list"):
        extract(base_tensors(), changed(base_tensors()), drop="norm")


def test_checkpoints_must_hold_the_same_tensors(extract):
    before, after = base_tensors(), changed(base_tensors())
    with pytest.raises(CompositionError, match=r"'model.extra.weight': in .*finetuned and not in .*base"):
        extract(before, after | {"model.extra.weight": torch.ones(3)})
    with pytest.raises(CompositionError, match=r"'model.extra.weight': in .*base and not in .*finetuned"):
        extract(before | {"model.extra.weight": torch.ones(3)}, after)
    grown = after | {f"{EMBED}.weight": torch.ones(52, 96)}
    with pytest.raises(CompositionError, match=r"embed_tokens.weight' is \[50, 96\] in .* and \[52, 96\] in"):
        extract(before, grown, save="auto")
    found = extract(before, grown | {"model.extra.weight": torch.ones(3)}, drop=["embed_tokens", "extra"])
    assert found.report.left_out == {f"{EMBED}.weight": None, "model.extra.weight": None}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("side", ["base", "finetuned"])
@pytest.mark.parametrize("name", [f"{Q}.weight", f"{NORM}.weight"])
def test_a_number_that_is_none_is_named(extract, bad, side, name):
    before, after = base_tensors(), changed(base_tensors(), **MORE)
    tensors = {"base": before, "finetuned": after}[side]
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[5] = bad
    if (side, name) == ("base", f"{NORM}.weight"):  # it is replaced as a whole
        assert name in extract(before, after, save="auto").report.saved
        return
    with pytest.raises(NumericalError, match=rf"'{name}' of .*{side} holds {bad} at"):
        extract(before, after, save="auto")


def test_a_difference_beyond_float32_is_refused(extract):
    weight = torch.full((8, 8), 3e38)
    with pytest.raises(NumericalError, match=r"'layer.weight': the difference"):
        extract(*one(weight, -weight), rank=1)


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.steps"])
def test_integers_that_differ_are_refused_by_name(extract, name):
    before, after = base_tensors(), changed(base_tensors())
    numbers = torch.arange(12, dtype=torch.int8).reshape(3, 4)
    assert extract(before | {name: numbers}, after | {name: numbers}).report.unchanged == 3
    for save in ("auto", "none"):
        with pytest.raises(CompositionError, match=f"'{name}' differs, and is I8"):
            extract(before | {name: numbers}, after | {name: numbers + 1}, save=save)
    found = extract(before | {name: numbers}, after | {name: numbers + 1}, drop=[name])
    assert found.report.left_out == {name: None}


def test_a_parameter_of_a_module_that_holds_others_cannot_be_saved(extract):
    before, after = base_tensors(), changed(base_tensors())
    with pytest.raises(CompositionError, match="'model' holds other modules"):
        extract(before | {"model.scale": torch.ones(2)}, after | {"model.scale": torch.zeros(2)}, save="auto")


def test_a_short_name_saves_all_modules_that_peft_would_wrap(extract):
    """PEFT compares the ends of names, and stops at a wrapped module without tensors."""
    before = {"layers.0.norm.weight": torch.ones(8), "norm.weight": torch.ones(8), "layers.0.q.weight": normal(9, 8)}
    after = before | {"norm.weight": torch.zeros(8), "layers.0.q.weight": normal(9, 8, seed=1)}
    found = extract(before, after, rank=2, save="auto")
    assert found.adapter.settings.modules_to_save == ("layers.0.norm", "norm")
    assert set(found.adapter.extras) == {"layers.0.norm.weight", "norm.weight"}
    assert lf.content_id(found.adapter)
    with pytest.raises(CompositionError, match=r"that means 'layers.0.q', too, which is a target"):
        extract(before | {"q.bias_scale": torch.ones(1)}, after | {"q.bias_scale": torch.zeros(1)}, rank=2, save="auto")


def test_biases_travel_alone(extract):
    before = base_tensors() | {f"{Q}.bias": torch.zeros(160), "model.other.bias": torch.zeros(3)}
    after = changed(before, **{f"{Q}.bias": torch.ones(160), "model.other.bias": torch.ones(3)})
    adapter = extract(before, after, save=["bias"]).adapter
    assert set(adapter.extras) == {f"{Q}.base_layer.bias", "model.other.bias"}
    assert (adapter.settings.bias, adapter.settings.modules_to_save) == ("all", ())
    peft_format.encode(adapter)


CONV1D = {"model_type": "gpt2"}


def conv1d(m=30, n=90):
    """Tensors as transformers' Conv1D keeps them, (in, out)."""
    before = {"h.0.attn.c_attn.weight": normal(m, n), "h.0.attn.c_attn.bias": torch.zeros(n)}
    return before, before | {"h.0.attn.c_attn.weight": before["h.0.attn.c_attn.weight"] + update(m, n, 2, 0.01)}


@pytest.mark.parametrize("config", [CONV1D, None])
def test_conv1d_is_known_by_the_config_or_by_its_bias(extract, config):
    before, after = conv1d()
    adapter = extract(before, after, config=config).adapter
    pair = adapter.targets["h.0.attn.c_attn"]
    assert (adapter.settings.fan_in_fan_out, pair.shape) == (True, (90, 30))
    d = after["h.0.attn.c_attn.weight"] - before["h.0.attn.c_attn.weight"]
    assert torch.allclose(pair.delta().T.float(), d, atol=1e-6)


def test_a_bias_that_contradicts_is_refused(extract):
    with pytest.raises(CompositionError, match=r"c_attn.weight' is \[30, 90\], and its bias says .*\(in, out\)"):
        extract(*conv1d(), config={"model_type": "llama"})
    with pytest.raises(CompositionError, match=r"its bias says .*\(in, out\)"):
        extract(*conv1d(), fan_in_fan_out=False)
    before, after = base_tensors(), changed(base_tensors())
    assert extract(before, after, fan_in_fan_out=True).adapter.targets[Q].shape == (96, 160)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "nothing given"),
        ({"rank": 2, "auto": True}, "rank and auto given"),
        ({"rank": 0}, "rank is 0; expected 1 to"),
        ({"energy": 1.5}, "energy is 1.5"),
        ({"energy": 0.0}, r"energy is 0\.0"),
        ({"auto": True, "max_rank": 0}, "max_rank is 0"),
        ({"auto": True, "oversample": 0}, "oversample is 0"),
        ({"auto": True, "seed": -1}, "seed is -1"),
    ],
)
def test_bad_criteria(tmp_path, options, says):
    with pytest.raises(CompositionError, match=says):
        lf.extract(tmp_path / "a", tmp_path / "b", **options)


def test_bad_paths_and_configs(tmp_path, extract):
    with pytest.raises(NotFoundError):
        lf.extract(tmp_path / "a", tmp_path / "b", rank=1)
    for config in ("[]", "{"):
        base, finetuned = write(tmp_path / "base", base_tensors()), write(tmp_path / "ft", changed(base_tensors()))
        (base / "config.json").write_text(config)
        with pytest.raises(FormatError, match=r"base.config\.json"):
            lf.extract(base, finetuned, rank=1)


def test_the_derivation_names_both_checkpoints_by_content(extract, tmp_path):
    found = extract(base_tensors(), changed(base_tensors()), energy=0.9, drop=["norm"], config={"_name_or_path": "b/c"})
    derivation = found.adapter.derivation
    assert (derivation.operation, derivation.version) == ("extract", 1)
    assert [(item.source, item.weight) for item in derivation.inputs] == [
        (content(tmp_path / "finetuned"), 1.0),
        (content(tmp_path / "base"), -1.0),
    ]
    expected = {"energy": 0.9, "max_rank": 128, "oversample": 8, "seed": 0, "drop": "norm"}
    assert derivation.parameters == expected
    assert found.adapter.base.name == "b/c"


def content(path):
    with open_checkpoint(path) as checkpoint:
        (shard,) = checkpoint.shards.values()
        hasher = TensorHasher(shard.header)
        for chunk in read_chunks(shard.fd):
            hasher.feed(chunk)
        found = checkpoint_digest((tensor.entry, tensor.digest) for tensor in hasher.tensors)
    assert isinstance(found, Digest)
    return found


def test_shards_and_one_file_are_the_same_model(extract, tmp_path):
    before, after = base_tensors(), changed(base_tensors())
    whole = extract(before, after)
    folder = tmp_path / "shards"
    folder.mkdir()
    names = list(after)
    for number in (0, 1):
        save_file({name: after[name] for name in names[number::2]}, folder / f"part-{number}.safetensors")
    index = {"weight_map": {name: f"part-{place % 2}.safetensors" for place, name in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    found = lf.extract(tmp_path / "base", folder, auto=True)
    assert found.adapter.derivation == whole.adapter.derivation
    assert lf.content_id(found.adapter) == lf.content_id(whole.adapter)


def test_the_option_names_the_base(extract):
    config = {"_name_or_path": "said/here", "architectures": ["LlamaForCausalLM"]}
    found = extract(base_tensors(), changed(base_tensors()), config=config, base_name="mine", drop=["embed_tokens"])
    assert (found.adapter.base.name, found.adapter.settings.task_type) == ("mine", "CAUSAL_LM")


@pytest.mark.parametrize("spread", [0.0, 0.5, 1.0])
def test_the_edge_of_noise_is_where_its_singular_values_end(spread):
    rows, columns = (torch.exp(spread * normal(count, seed=count, std=1).double()) for count in (300, 500))
    deviations = rows[:, None] * columns[None, :]
    sample = deviations * normal(300, 500, seed=3, std=1)
    variances = squares(deviations)
    found = edge_of(variances)
    # from below, the largest singular value wavers; one row that dominates is counted to its bound
    assert 0.97 < found / float(torch.linalg.svdvals(sample)[0]) < 1.3
    if not spread:
        assert found == pytest.approx(math.sqrt(300) + math.sqrt(500), rel=1e-3)


def test_no_noise_has_no_edge():
    assert edge_of(Squares(torch.zeros(3), torch.zeros(4))) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_rounding_noise_is_that_of_rounding(dtype):
    exact = normal(400, 300).double() * torch.logspace(-2, 2, 300).double()
    rounded = exact.to(dtype)
    step = torch.nextafter(rounded.abs(), torch.full_like(rounded, math.inf)).double() - rounded.abs().double()
    assert rounding_noise(rounded).total == pytest.approx(float(step.square().sum() / 12), rel=1e-5)
    if dtype != torch.float64:
        assert rounding_noise(rounded).total == pytest.approx(float((exact - rounded).square().sum()), rel=0.05)


def llama(**more):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=100, **more))


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    ids = {"bos_token_id": 1, "eos_token_id": 2}
    return GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=100, n_positions=32, **ids))


MODELS = {
    "llama": lambda: llama(tie_word_embeddings=False),
    "llama tied": lambda: llama(tie_word_embeddings=True),
    "llama with biases": lambda: llama(tie_word_embeddings=False, attention_bias=True, mlp_bias=True),
    "gpt2": gpt2,
}


def trained(model):
    """Change every parameter: matrices of linear layers by a rank of 3, the rest all over."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            linear = parameter.dim() == 2 and not any(part in name for part in ("embed", "wte", "wpe", "head"))
            m, n = parameter.reshape(parameter.shape[0], -1).shape
            low_rank = 0.02 * torch.randn(m, 3) @ torch.randn(3, n)
            parameter.add_(low_rank if linear else 0.05 * torch.randn_like(parameter))


@pytest.mark.filterwarnings("ignore")  # PEFT's and transformers' own remarks
@pytest.mark.parametrize("name", MODELS)
def test_base_and_adapter_compute_what_the_fine_tune_does_in_peft(name, tmp_path):
    from peft import PeftModel

    torch.manual_seed(0)
    model = MODELS[name]()
    model.save_pretrained(tmp_path / "base")
    trained(model)
    model.save_pretrained(tmp_path / "finetuned")
    extracted = lf.extract(tmp_path / "base", tmp_path / "finetuned", auto=True, save="auto")
    assert {target.rank for target in extracted.report.targets.values()} == {3}
    lf.save(extracted.adapter, tmp_path / "adapter")
    tokens = torch.arange(12)[None]
    base, finetuned = (type(model).from_pretrained(tmp_path / which) for which in ("base", "finetuned"))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        adapted = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert not [warning for warning in said if "missing" in str(warning.message).lower()]
    with torch.no_grad():
        expected = finetuned(tokens).logits
        assert float((adapted(tokens).logits - expected).abs().max()) < 1e-5
        assert float((adapted.merge_and_unload()(tokens).logits - expected).abs().max()) < 1e-5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_merging_it_gives_the_fine_tune_back(name, tmp_path):
    torch.manual_seed(0)
    model = MODELS[name]()
    model.save_pretrained(tmp_path / "base")
    trained(model)
    model.save_pretrained(tmp_path / "finetuned")
    extracted = lf.extract(tmp_path / "base", tmp_path / "finetuned", rank=3, save="auto")
    lf.save(extracted.adapter, tmp_path / "adapter")
    lf.merge(tmp_path / "base", f"{tmp_path}/adapter", out=tmp_path / "merged")
    found, expected = (type(model).from_pretrained(tmp_path / which).state_dict() for which in ("merged", "finetuned"))
    for key, tensor in expected.items():
        assert torch.allclose(found[key], tensor, atol=1e-6), key
