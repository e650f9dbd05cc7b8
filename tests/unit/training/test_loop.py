"""Runs: resumed to the same bits from every step and after kill -9, and refused in one sentence where they must be."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import loraforge as lf
from loraforge.errors import NumericalError, StoreError, TargetError, TrainingError
from loraforge.layers import LoraConfig, inject
from loraforge.training import TrainConfig, train
from loraforge.training.batches import Cursor, count_labels, windows
from loraforge.training.step import evaluate


@pytest.fixture(autouse=True)
def _one_thread():
    """Small tensors on a busy machine: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Net(nn.Module):
    """A small classifier with dropout of its own, whose forward gives a loss."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 16)
        self.drop = nn.Dropout(0.1)
        self.outer = nn.Linear(16, 3)

    def forward(self, x, labels):
        y = self.outer(self.drop(torch.tanh(self.inner(x))))
        return {"loss": nn.functional.cross_entropy(y, labels, ignore_index=-100)}


def net():
    torch.manual_seed(0)
    return Net()


def samples(count=30, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 8, generator=generator)
    return [{"x": row, "labels": (row[0] > row[1]).long() + (row[2] > 1).long()} for row in x]


def batches(**options):
    """A loader that shuffles, and whose fetches draw random numbers."""

    def collate(rows):
        x = torch.stack([row["x"] for row in rows])
        noise = 0.01 * torch.randn_like(x) + random.random() * 1e-3 + float(np.random.rand()) * 1e-3  # noqa: NPY002
        return {"x": x + noise, "labels": torch.stack([row["labels"] for row in rows])}

    return DataLoader(samples(), batch_size=2, shuffle=True, collate_fn=collate, **options)


CONFIG = TrainConfig(rank=2, targets=("inner", "outer"), lr=2e-2, dropout=0.2, epochs=2, save_every=1, keep=99)
THIRTY = replace(CONFIG, epochs=4, grad_accum=2, schedule="cosine", warmup=3, eval_every=3, patience=50, bias="all")


class Stop:
    """Asks a run to stop after a number of steps."""

    def __init__(self, steps):
        self.left = steps

    def __call__(self):
        self.left -= 1
        return self.left <= 0


def test_resumed_from_every_step_a_run_ends_in_the_same_bits(tmp_path):
    """32 steps with dropout, a shuffling loader, accumulation with a short last window, evaluation, saved biases."""
    valid = list(batches())
    whole, losses = None, []
    whole = train(net(), batches(), THIRTY, valid=valid, on_step=lambda metrics: losses.append(metrics.loss))
    assert len(losses) == 32
    run = tmp_path / "run"
    for step in range(1, 33):
        seen = []
        adapter = train(
            net(),
            batches(),
            THIRTY,
            valid=valid,
            run=run,
            resume=step > 1,
            should_stop=Stop(1),
            on_step=lambda metrics, seen=seen: seen.append((metrics.step, metrics.loss)),
        )
        assert seen == [(step, losses[step - 1])]
    assert lf.content_id(adapter) == lf.content_id(whole)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == losses
    again = train(net(), batches(), THIRTY, valid=valid, run=run, resume=True)
    assert lf.content_id(again) == lf.content_id(whole), "a run that has ended stays as it is"


@pytest.mark.parametrize("init", ["pissa", "kaiming"])
def test_early_stopping_returns_the_best_and_survives_a_resume(init, tmp_path):
    config = replace(CONFIG, lr=0.5, epochs=20, eval_every=2, patience=3, init=init, dora=init == "kaiming")
    valid, seen = list(batches()), []
    whole = train(net(), batches(), config, valid=valid, on_step=seen.append)
    assert len(seen) < 20 * 15
    losses = {metrics.step: metrics.eval_loss for metrics in seen if metrics.eval_loss is not None}
    best = min(losses, key=losses.get)
    assert max(losses) - best == 6
    train(net(), batches(), config, valid=valid, run=tmp_path / "run", should_stop=Stop(best + 3))
    parts = train(net(), batches(), config, valid=valid, run=tmp_path / "run", resume=True)
    assert lf.content_id(parts) == lf.content_id(whole)


SCRIPT = """
import sys
sys.path[:0] = sys.argv[2:]
from tests.unit.training.test_loop import CONFIG, batches, net
from dataclasses import replace
from loraforge.training import train
import time
train(net(), batches(), replace(CONFIG, keep=2), run=sys.argv[1], resume=True,
      on_step=lambda m: (print(m.step, flush=True), time.sleep(0.01)))
"""


def test_killed_at_any_moment_a_run_goes_on_to_the_same_bits(tmp_path):
    root = Path(__file__).parents[3]
    run, config = tmp_path / "run", replace(CONFIG, keep=2)
    whole = train(net(), batches(), config)
    for steps in (1, 4, 2):
        command = [sys.executable, "-c", SCRIPT, str(run), str(root), str(root / "registry")]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        ) as process:
            for _ in range(steps):
                assert process.stdout.readline().strip().isdigit()
            time.sleep(random.Random(steps).random() * 0.02)
            os.kill(process.pid, signal.SIGKILL)
    (run / ".step-0000099.left").mkdir()
    adapter = train(net(), batches(), config, run=run, resume=True)
    assert lf.content_id(adapter) == lf.content_id(whole)
    assert sorted(path.name for path in run.iterdir()) == ["metrics.jsonl", "step-0000029", "step-0000030"]
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == list(range(1, 31))
    assert lf.content_id(lf.load(run / "step-0000030")) == lf.content_id(adapter)


def test_the_callers_model_and_generators_are_left_as_they_were():
    model = net().eval()
    model.inner.weight.requires_grad_(requires_grad=False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    train(model, batches(), replace(CONFIG, bias="all", grad_accum=7))
    assert torch.equal(torch.get_rng_state(), state[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == state[1:]  # noqa: NPY002
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module.training for module in model.modules())
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]
    assert [p.grad for p in model.parameters()] == [None] * 4


def test_the_seed_decides_and_the_data_is_read_in_windows():
    one, two = (lf.content_id(train(net(), batches(), replace(CONFIG, seed=seed))) for seed in (1, 1))
    assert one == two
    assert lf.content_id(train(net(), batches(), replace(CONFIG, seed=2))) != one


class Again:
    """Can be read again, and has no length."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


@pytest.mark.parametrize("kind", [list, tuple, Again, lambda rows: DataLoader(rows, batch_size=None, shuffle=True)])
def test_every_batch_is_seen_once_an_epoch(kind):
    found = windows(kind(list(range(7))), 3, 0, Cursor())
    epochs = [[int(x) for window in (next(found), next(found), next(found)) for x in window.batches] for _ in range(2)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(7))] * 2


@pytest.mark.parametrize("accumulate", [1, 2, 5, 7])
@pytest.mark.parametrize("known", [True, False])
def test_a_run_has_the_epochs_it_was_asked_for_and_evaluates_after_each(accumulate, known):
    """15 micro-batches an epoch, of data that knows its length and of data that does not."""
    data, seen = list(batches()), []
    config = replace(CONFIG, epochs=3, grad_accum=accumulate, schedule="constant")
    train(net(), data if known else Again(data), config, valid=data, on_step=seen.append)
    per_epoch = math.ceil(15 / accumulate)
    assert [metrics.epoch for metrics in seen] == [epoch for epoch in range(3) for _ in range(per_epoch)]
    assert [m.step for m in seen if m.eval_loss is not None] == [per_epoch, 2 * per_epoch, 3 * per_epoch]


def test_an_iterator_is_enough_for_the_steps_that_it_has():
    seen = []
    train(net(), iter(list(batches())), replace(CONFIG, max_steps=15), on_step=seen.append)
    assert len(seen) == 15


class Broken(Net):
    """Gives what it is told to at its n-th forward."""

    def __init__(self, value, at=3):
        super().__init__()
        self.value, self.left = value, at

    def forward(self, x, labels):
        self.left -= 1
        loss = super().forward(x, labels)["loss"]
        return loss * self.value if self.left <= 0 else loss


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nothing_that_is_not_finite_is_saved(value, tmp_path):
    model = Broken(value)
    with pytest.raises(NumericalError, match=rf"step 3: the loss is {value}.*nothing of it was saved"):
        train(model, batches(), CONFIG, run=tmp_path / "run")
    assert not hasattr(model.inner, "lora")
    left = sorted(path.name for path in (tmp_path / "run").glob("step-*"))
    assert left == ["step-0000001", "step-0000002"]
    for path in left:
        for name, pair in lf.load(tmp_path / "run" / path).targets.items():
            pair.check_finite(name)


def test_a_factor_that_overflows_is_not_returned():
    with pytest.raises(NumericalError):
        train(net(), batches(), replace(CONFIG, lr=1e38, max_grad_norm=0))


class Unreached(Net):
    def __init__(self):
        super().__init__()
        self.never = nn.Linear(8, 8)


def test_a_tensor_without_gradient_is_named():
    with pytest.raises(TrainingError, match=r"2 of 6 trained tensors got no gradient.*'never\.lora\.a'"):
        train(Unreached(), batches(), replace(CONFIG, targets="all-linear"))


def masked(batch):
    return {**batch, "labels": torch.full_like(batch["labels"], -100)}


def test_micro_batches_without_labels_are_left_out_and_windows_of_them_refused():
    rows = [{key: value[None] for key, value in sample.items()} for sample in samples(6)]
    config = replace(CONFIG, grad_accum=3, epochs=1)
    half = [rows[0], masked(rows[1]), rows[2], rows[3], rows[4], masked(rows[5])]
    seen = []
    train(net(), half, config, on_step=seen.append)
    assert [metrics.tokens for metrics in seen] == [2, 2]
    assert all(math.isfinite(metrics.loss) for metrics in seen)
    with pytest.raises(TrainingError, match="none of the 3 micro-batches of a step has a label"):
        train(net(), [masked(row) for row in rows], config)


def test_what_cannot_start_says_why(tmp_path):
    endless = (batch for batch in batches())
    with pytest.raises(TrainingError, match="does not say its length, which a linear schedule needs"):
        train(net(), endless, CONFIG)
    with pytest.raises(TrainingError, match="an iterator, which cannot be read again"):
        train(net(), iter(list(batches())), replace(CONFIG, max_steps=40))
    with pytest.raises(TrainingError, match="the data gives no batch"):
        train(net(), [], CONFIG)
    with pytest.raises(TrainingError, match="returned Tensor without a loss"):
        train(nn.Sequential(nn.Linear(8, 3)), [torch.randn(2, 8)], TrainConfig(rank=2))
    with pytest.raises(TargetError, match="match no module"):
        train(net(), batches(), replace(CONFIG, targets=("q_proj",)))
    with pytest.raises(TrainingError, match="device is 'gpu'"):
        train(net(), batches(), replace(CONFIG, device="gpu"))
    with pytest.raises(TrainingError, match="device is 'cuda:99', which torch cannot use here"):
        train(net(), batches(), replace(CONFIG, device="cuda:99"))
    with pytest.raises(TrainingError, match="Net has no gradient_checkpointing_enable"):
        train(net(), batches(), replace(CONFIG, grad_checkpoint=True))
    with pytest.raises(TrainingError, match="eval_every and patience are about an evaluation"):
        train(net(), batches(), replace(CONFIG, patience=3))
    with pytest.raises(TrainingError, match="the model has no parameters"):
        train(nn.Identity(), batches(), CONFIG)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lr", 0), ("lr", math.nan), ("epochs", 0), ("max_steps", 0), ("grad_accum", 1.5), ("warmup", -1),
        ("schedule", "step"), ("precision", "fp16"), ("betas", (0.9, 1.0)), ("patience", 0), ("rank", -1),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_named(field, value):
    with pytest.raises(lf.LoraforgeError, match=f"{field} is "):
        TrainConfig(**{field: value})


def test_a_run_directory_is_not_mixed_up(tmp_path):
    run = tmp_path / "run"
    train(net(), batches(), CONFIG, run=run, should_stop=Stop(2))
    with pytest.raises(TrainingError, match="holds a run already, up to step-0000002: resume it, or name another"):
        train(net(), batches(), CONFIG, run=run)
    with pytest.raises(TrainingError, match=r"was begun with lr=0\.02, now it is 0\.1"):
        train(net(), batches(), replace(CONFIG, lr=0.1), run=run, resume=True)
    train(net(), batches(), replace(CONFIG, keep=1), run=run, resume=True, should_stop=Stop(1))
    assert [path.name for path in run.glob("step-*")] == ["step-0000003"]
    (run / "step-0000003" / "state.safetensors").write_bytes(b"")
    with pytest.raises(StoreError, match="is no checkpoint that can be read"):
        train(net(), batches(), CONFIG, run=run, resume=True)


def test_training_goes_on_from_an_adapter():
    first = train(net(), batches(), CONFIG)
    second = train(net(), batches(), replace(CONFIG, seed=5), adapter=first)
    assert lf.content_id(second) != lf.content_id(first)
    seen = []
    train(net().eval(), batches(), replace(CONFIG, lr=1e-9, dropout=0.0), adapter=first, on_step=seen.append)
    fresh = []
    train(net().eval(), batches(), replace(CONFIG, lr=1e-9, dropout=0.0), on_step=fresh.append)
    assert sum(m.loss for m in seen) < sum(m.loss for m in fresh)


def test_bf16_trains_too():
    seen = []
    adapter = train(net(), batches(), replace(CONFIG, precision="bf16", epochs=6), on_step=seen.append)
    losses = [metrics.loss for metrics in seen]
    assert sum(losses[-15:]) < 0.9 * sum(losses[:15])
    assert {pair.a.dtype for pair in adapter.targets.values()} == {torch.float32}


def test_evaluation_is_weighted_by_labels_and_runs_without_dropout():
    model, rows = net(), [{key: value[None] for key, value in sample.items()} for sample in samples(9)]
    ragged = [{key: torch.cat([row[key] for row in part]) for key in ("x", "labels")} for part in (rows[:1], rows[1:])]
    full = {key: torch.cat([row[key] for row in rows]) for key in ("x", "labels")}
    inject(model, LoraConfig(rank=2, dropout=0.5))
    for parameter in model.parameters():
        parameter.data.normal_()
    model.train()
    found = evaluate(model, ragged, count_labels, None)
    assert model.training
    assert found == pytest.approx(float(model.eval()(**full)["loss"].detach()), rel=1e-6)
    with pytest.raises(TrainingError, match="the validation data has no label at all"):
        evaluate(model, [masked(full)], count_labels, None)


class Moody(Net):
    """Its loss is NaN in evaluation mode from the second time on."""

    asked = 0

    def forward(self, x, labels):
        loss = super().forward(x, labels)["loss"]
        self.asked += not self.training
        return loss * math.nan if not self.training and self.asked > 1 else loss


def moody():
    torch.manual_seed(0)
    return Moody()


def test_an_evaluation_that_is_not_a_number_is_never_the_best():
    seen, config = [], replace(CONFIG, epochs=9, schedule="constant")
    stopped = train(moody(), batches(), replace(config, patience=2), valid=samples_once(), on_step=seen.append)
    judged = [metrics.eval_loss for metrics in seen if metrics.eval_loss is not None]
    assert [math.isfinite(loss) for loss in judged] == [True, False, False]
    first = train(moody(), batches(), replace(config, max_steps=15))
    assert lf.content_id(stopped) == lf.content_id(first)


def samples_once():
    return [{key: value[None] for key, value in samples(1)[0].items()}]


def test_labels_are_counted_as_the_loss_counts_them():
    labels = torch.tensor([[5, 1, -100], [-100, 2, 3]])
    assert count_labels(net(), {"labels": labels}) == 4
    causal = type("ToyForCausalLM", (nn.Module,), {})()
    assert count_labels(causal, {"labels": labels}) == 3
    assert count_labels(net(), (torch.zeros(7, 2), 1)) == 7
    assert count_labels(net(), torch.zeros(4, 2)) == 4
