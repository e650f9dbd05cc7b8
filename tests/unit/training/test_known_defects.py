"""Thirty defects that users of other trainers have reported, and where each is held off.

``TABLE`` gives for every one where it was seen and what tests it; those without a test in another module are below.
Number 28, compiling again for each adapter, cannot be: what is compiled has one. Quantised bases are refused, which is
all that 17 and 22 ask.
"""

import importlib
import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import loraforge as lf
from loraforge.errors import TargetError, TrainingError
from loraforge.layers import LoraConfig, attach, inject
from loraforge.training import TrainConfig, train
from loraforge.training.batches import count_labels
from loraforge.training.data.loader import make_loader
from loraforge.training.data.tokens import Row
from loraforge.training.losses import loss_of
from loraforge.training.schedule import rate
from loraforge.training.step import evaluate, window_gradient
from tests.conformance.peft_cases import make
from tests.unit.training.test_loop import CONFIG, Stop, batches, net, samples

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own remarks

HERE, LOOP, DATA = "unit.training.test_known_defects", "unit.training.test_loop", "unit.training.test_data"
RANKS, LAYERS, PEFT = "unit.training.test_ranks", "unit.layers.test_layers", "conformance.test_peft_training"
CLI, MANY = "cli.test_train", "unit.training.test_many"

TABLE: dict[int, tuple[str, str, str, str]] = {
    1: ("a mean of means over micro-batches", "transformers#34191 #35438 #37766", HERE, "test_01_"),
    2: ("a short last window divided by all of grad_accum", "ms-swift#10084", HERE, "test_02_"),
    3: ("processes with unequal tokens", "ms-swift#10084", RANKS, "test_two_processes_are_one"),
    4: ("the last batch, bin or sample dropped", "DeepSpeed#8347 axolotl#3849 LLaMA-Factory#5271", HERE, "test_04_"),
    5: ("eos never learned where it pads", "unsloth#416 trl#3091", DATA, "test_eos_is_learned_where"),
    6: ("eos with a row in a frozen head that nobody trained", "Qwen3#1064 LLaMA-Factory#7943", CLI, "test_an_ending_"),
    7: ("a cut sample that ends in eos", "torchtune#2792 trl#4698", DATA, "test_an_answer_ends_in_a_learned_eos"),
    8: ("bos twice", "OpenRLHF#393", DATA, "test_there_is_one_bos"),
    9: ("all labels masked: a loss of NaN", "transformers#27733 trl#1053", LOOP, "test_micro_batches_without"),
    10: ("packed samples that see each other", "trl#805 #1230", DATA, "test_packed_rows_do_not_see_each_other"),
    11: ("a resume without the optimizer", "alpaca-lora#72 FastChat#1280", LOOP, "test_resumed_from_every_step"),
    12: ("a resume with another order of data", "transformers#46628 #39215 #17032", DATA, "test_resume_with_packing"),
    13: ("a schedule stepped for each micro-batch or process", "accelerate#963 diffusers#3954", HERE, "test_13_"),
    14: ("NaN saved; factors in float16", "needle#53 ms-swift#5580", LOOP, "test_nothing_that_is_not_finite_is_saved"),
    15: ("the best evaluation is NaN", "transformers#24103 #36201", LOOP, "test_an_evaluation_that_is"),
    16: ("inputs kept in float32 as well", "peft#701 #1090 #2421 AgileRL#623", HERE, "test_16_"),
    17: ("preparing a base casts it: twice the memory", "peft#816 #1149 #3265 bitsandbytes#1569", HERE, "test_17_"),
    18: ("checkpointing loses the gradients of an adapter", "peft#1142 LoRA#120 FastChat#581", HERE, "test_18_"),
    19: ("a parameter that some processes reach", "peft#393 #951", RANKS, "test_two_processes_are_one"),
    20: ("an empty adapter saved", "peft#286 #453 #1402 trl#4416", HERE, "test_20_"),
    21: ("tied weights: one is trained, both change", "peft#2018 transformers#45127", HERE, "test_21_"),
    22: ("merging into a quantised base", "peft#2321 qlora#28", LAYERS, "test_layers_that_cannot_be_adapted_say_why"),
    23: ("DoRA's magnitudes of another weight", "mlx-examples#832", HERE, "test_23_"),
    24: ("only some of the adapter is updated", "mLoRA#138 peft#631 #1303", HERE, "test_24_"),
    25: ("rows of the base alone beside an adapter's", "sglang#5928", MANY, "test_rows_of_the_base_alone"),
    26: ("weights that were never loaded", "mlx-examples#940 needle#53", CLI, "test_a_base_without_"),
    27: ("evaluation with dropout", "peft#2438", LOOP, "test_evaluation_is_weighted_by_labels_and_runs_without"),
    29: ("an evaluation that merges, and drifts", "loralib", HERE, "test_29_"),
    30: ("a mean of batch means in the evaluation", "litgpt", LOOP, "test_evaluation_is_weighted_by_labels_and_runs"),
}  # fmt: skip


@pytest.mark.parametrize("number", TABLE)
def test_the_table_names_tests_that_exist(number):
    _, _, module, start = TABLE[number]
    assert any(name.startswith(start) for name in dir(importlib.import_module(f"tests.{module}")))


@pytest.fixture(autouse=True)
def _one_thread():
    """Small tensors on a busy machine: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def llama(**options):
    torch.manual_seed(0)
    return make.llama(**options)()


def ragged():
    """Three micro-batches of 11, 4 and 1 labels."""
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(3, 32, (1, length), generator=generator) for length in (12, 5, 2)]
    return [{"input_ids": row, "labels": row.clone()} for row in rows]


def gradient_of(model, injected):
    found = torch.cat([parameter.grad.flatten() for parameter in injected.parameters().values()])
    model.zero_grad()
    return found


def far(one, other):
    return float((one - other).norm() / other.norm())


def test_01_windows_are_normalised_by_their_labels():
    model = llama()
    injected = inject(model, LoraConfig(rank=4))
    window_gradient(model, ragged(), count_labels, None)
    ours = gradient_of(model, injected)
    total = sum(count_labels(model, batch) for batch in ragged())
    for batch in ragged():
        (loss_of(model, batch, None) * count_labels(model, batch) / total).backward()
    expected = gradient_of(model, injected)
    for batch in ragged():
        (loss_of(model, batch, None) / 3).backward()
    assert far(ours, expected) < 1e-6
    assert far(gradient_of(model, injected), expected) > 0.3, "a mean of means is another gradient"


def test_02_a_short_last_window_is_a_whole_step():
    seen = []
    config = TrainConfig(rank=4, grad_accum=2, lr=1e-20, max_grad_norm=0, seed=1)
    train(llama(), ragged(), config, on_step=seen.append)
    alone = []
    train(llama(), ragged()[2:], config, on_step=alone.append)
    assert [metrics.tokens for metrics in seen] == [15, 1]
    assert seen[1].grad_norm == pytest.approx(alone[0].grad_norm, rel=1e-5)


class Recording(nn.Module):
    """Remembers the first token of every row that it is given."""

    def __init__(self):
        super().__init__()
        self.inner, self.seen = nn.Linear(4, 4), []

    def forward(self, input_ids, labels, **_):
        starts = input_ids[:, 0].tolist() if "position_ids" not in _ else self._starts(input_ids, _["position_ids"])
        self.seen += starts
        return self.inner(torch.nn.functional.one_hot(labels.clamp(0, 3), 4).float()).square().mean()

    @staticmethod
    def _starts(ids, positions):
        return [token for token in ids[positions == 0].tolist() if token >= 100]


@pytest.mark.parametrize("pack", [None, torch.float32])
@pytest.mark.parametrize("grad_accum", [1, 2, 3])
def test_04_every_sample_is_seen_once_an_epoch(pack, grad_accum):
    rows = [Row((100 + number, *[1] * (number % 4 + 1)), (100 + number,) * (number % 4 + 2)) for number in range(17)]
    model = Recording()
    loader = make_loader(rows, 3, seed=0, pad=0, max_length=6, pack_dtype=pack)
    train(model, loader, TrainConfig(rank=1, grad_accum=grad_accum, epochs=2), count=lambda *_: 1)
    half = len(model.seen) // 2
    assert sorted(model.seen[:half]) == sorted(model.seen[half:]) == [100 + number for number in range(17)]


@pytest.mark.parametrize("grad_accum", [1, 3])
def test_13_the_rate_is_a_function_of_the_step(grad_accum, tmp_path):
    config = replace(CONFIG, grad_accum=grad_accum, schedule="cosine", warmup=2)
    steps = 2 * math.ceil(15 / grad_accum)
    train(net(), batches(), config, run=tmp_path / "run", should_stop=Stop(3))
    train(net(), batches(), config, run=tmp_path / "run", resume=True)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["lr"] for line in lines] == [config.lr * rate("cosine", step, steps, 2) for step in range(steps)]


@pytest.mark.parametrize("autocast", [True, False])
def test_16_inputs_are_kept_once_and_in_their_own_type(autocast):
    layer = nn.Sequential(nn.Linear(64, 32, dtype=torch.bfloat16))
    injected = inject(layer, LoraConfig(rank=2, dropout=0.3, targets=("0",)))
    x = torch.randn(50, 64, dtype=torch.bfloat16, requires_grad=True)
    kept = []

    def pack(tensor):
        kept.append((tensor.dtype, tuple(tensor.shape)))
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        layer(x)
    assert [entry for entry in kept if entry[1] == (50, 64)] == [(torch.bfloat16, (50, 64))]
    assert {pair.a.dtype for pair in injected.adapter().targets.values()} == {torch.float32}


def test_14_factors_in_half_precision_are_trained_in_float32():
    first = train(net(), batches(), replace(CONFIG, max_steps=2))
    halved = replace(first, targets={n: replace(p, a=p.a.half(), b=p.b.half()) for n, p in first.targets.items()})
    model = net()
    injected = attach(model, halved)
    assert {parameter.dtype for parameter in injected.parameters().values()} == {torch.float32}
    with pytest.raises(TrainingError, match="precision is 'fp16'"):
        TrainConfig(precision="fp16")


def test_17_the_base_is_neither_cast_nor_copied():
    model = llama().to(torch.bfloat16)
    before = {name: (parameter.data_ptr(), parameter.dtype) for name, parameter in model.named_parameters()}
    injected = inject(model, LoraConfig(rank=2))
    mine = set(injected.parameters())
    after = {n: (p.data_ptr(), p.dtype) for n, p in model.named_parameters() if n not in mine}
    assert after == before


@pytest.mark.parametrize("options", [{}, {"dropout": 0.1}, {"dora": True}], ids=str)
def test_18_checkpointing_keeps_the_gradients_of_every_factor(options):
    found = []
    for checkpoint in (False, True):
        config = TrainConfig(rank=2, lr=1e-2, max_steps=3, grad_checkpoint=checkpoint, **options)
        found.append(train(llama(num_hidden_layers=2), ragged(), config))
    assert all(bool(pair.b.any()) for pair in found[1].targets.values())
    for name, pair in found[0].targets.items():
        assert torch.allclose(pair.b, found[1].targets[name].b, rtol=1e-4, atol=1e-7)


def test_20_what_is_saved_is_whole(tmp_path):
    adapter = train(llama(), ragged(), TrainConfig(rank=2, save_every=1), run=tmp_path / "run")
    kept = lf.load(max((tmp_path / "run").glob("step-*")))
    assert lf.content_id(kept) == lf.content_id(adapter)
    assert all(pair.a.numel() and pair.b.numel() and bool(pair.b.any()) for pair in kept.targets.values())


def test_21_a_tied_head_is_not_trained_whole():
    tied = llama(tie_word_embeddings=True)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    for name, other in (("lm_head", "model.embed_tokens.weight"), ("embed_tokens", "lm_head.weight")):
        with pytest.raises(TargetError, match=rf"shares 'weight' with '{other}'.*untie them first"):
            inject(tied, LoraConfig(rank=2, modules_to_save=(name,)))
    assert not any(hasattr(module, "lora") for module in tied.modules())


def test_23_magnitudes_are_of_the_weight_that_they_scale():
    model = llama()
    tokens = ragged()[0]["input_ids"]
    before = model(input_ids=tokens).logits
    injected = inject(model, LoraConfig(rank=2, dora=True))
    assert torch.allclose(model(input_ids=tokens).logits, before, atol=1e-6)
    for name, pair in injected.adapter().targets.items():
        norms = model.get_submodule(name).weight.norm(dim=1)
        assert torch.allclose(pair.magnitude, norms, rtol=1e-6)


def test_24_everything_that_should_be_trained_is_and_nothing_else():
    model = llama(num_hidden_layers=3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = train(model, ragged(), TrainConfig(rank=2, max_steps=1, seed=1))
    start = train(model, ragged(), TrainConfig(rank=2, max_steps=3, lr=1e-2, seed=1))
    assert len(start.targets) == 21
    for name, pair in start.targets.items():
        assert bool(pair.b.any()), name
        assert not torch.equal(pair.a, first.targets[name].a), name
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_29_an_evaluation_writes_no_weight():
    model, data = net(), [{key: value[None] for key, value in sample.items()} for sample in samples(4)]
    injected = inject(model, LoraConfig(rank=2))
    nn.init.normal_(injected.parameters()["inner.lora.b"])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    evaluate(model, data, count_labels, None)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
