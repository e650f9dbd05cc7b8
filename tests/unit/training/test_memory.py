"""What ``--dry-run`` says a run will hold is what it holds: beside every allocation that torch's profiler records."""

import pytest
import torch
from torch import nn

from benchmarks import bench_memory as bench
from loraforge.errors import TrainingError
from loraforge.training import TrainConfig
from loraforge.training.batches import IGNORED
from loraforge.training.data.loader import make_loader
from loraforge.training.data.tokens import Row
from loraforge.training.memory import estimate
from tests.unit.training.test_loop import CONFIG, batches, net

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own remarks

SMALL = (
    "Llama, bfloat16 autocast", "Llama, checkpointing", "Llama, 4 accumulated", "Llama, packed", "Llama, DoRA",
    "Llama, PiSSA, biases", "Llama, head trained", "Llama, --parent", "GPT-2",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread():
    """Small tensors on a busy machine: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", SMALL)
def test_the_peak_is_foretold(name):
    foretold, measured = bench.both(bench.CASES[name])
    assert abs(foretold / measured - 1) < 0.15, (foretold, measured)


def test_the_model_is_left_as_it_was():
    model, data = net().eval(), list(batches())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    estimate(model, data, CONFIG, valid=data)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module.training for module in model.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


class Asking(nn.Linear):
    """Looks at a value in its forward."""

    def forward(self, x):
        return super().forward(x if bool(x.sum() > 0) else -x).sum()


def test_a_model_that_looks_at_values_cannot_be_followed():
    model = nn.Sequential(nn.Linear(8, 8), Asking(8, 1))
    with pytest.raises(TrainingError, match="depends on the values of its tensors"):
        estimate(model, [torch.zeros(2, 8)], TrainConfig(rank=2, targets=("0",)))


def test_the_heaviest_batches_are_those_of_the_epochs_to_come():
    short = [Row((5,) * n, (IGNORED,) * (n - 1) + (5,)) for n in range(2, 12)]
    learned = Row((6,) * 9, (6,) * 9)
    loader = make_loader([*short, learned], 2, seed=0, pad=0, max_length=16)
    for epochs in (1, 3):
        every = [batch for number in range(epochs) for batch in loader.epoch(number)]
        heavy = loader.heaviest(epochs)
        assert max(b["input_ids"].numel() for b in heavy) == max(b["input_ids"].numel() for b in every)
        assert any((batch["input_ids"] == 6).any() for batch in heavy)
        assert all(any(torch.equal(a["input_ids"], b["input_ids"]) for b in every) for a in heavy)


def test_longer_rows_and_ranks_take_more():
    loader = [make_loader([Row((5,) * n, (5,) * n)], 1, seed=0, pad=0, max_length=64) for n in (8, 64)]
    model = bench.llama(hidden_size=48, intermediate_size=64, num_hidden_layers=1)
    short, long, high = (
        estimate(model, data.heaviest(), TrainConfig(rank=rank))
        for data, rank in ((loader[0], 2), (loader[1], 2), (loader[1], 16))
    )
    assert short.base == long.base == high.base == sum(p.numel() * 4 for p in model.parameters()) + 16 * 2
    assert short.step < long.step
    assert short.adapter == long.adapter == high.adapter / 8 == long.moments / 2
    assert 0 < long.kept < long.step
