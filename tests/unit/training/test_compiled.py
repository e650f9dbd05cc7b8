"""``compile``: the same losses to rounding, the model left as it was, and a sentence where it does not work."""

from dataclasses import replace

import pytest
import torch
from torch._inductor import config as inductor

from loraforge.errors import TrainingError
from loraforge.training import train
from tests.unit.training.test_loop import CONFIG, Net, batches, net

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own, about what its compiler uses


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"precision": "bf16"}], ids=str)
def test_a_compiled_run_is_the_plain_one_to_rounding(options):
    model, losses = net(), {}
    model.drop.p = 0.0
    config = replace(CONFIG, dropout=0.0, max_steps=6, compile=False, **options)
    for compiled in (False, True):
        seen = []
        train(model, batches(), replace(config, compile=compiled), valid=list(batches()), on_step=seen.append)
        losses[compiled] = [metrics.loss for metrics in seen]
        assert model._compiled_call_impl is None
    assert losses[True] == pytest.approx(losses[False], rel=1e-2 if "precision" in options else 1e-5)


def test_what_cannot_be_compiled_is_said_in_a_sentence():
    with pytest.raises(TrainingError, match="compile and dropout exclude each other"):
        replace(CONFIG, compile=True)
    torch._dynamo.reset()
    model, said = Net(), r"torch.compile cannot compile this model here .*; leave compile out"
    with inductor.patch({"cpp.cxx": ("/no/compiler",)}), pytest.raises(TrainingError, match=said):
        train(model, batches(), replace(CONFIG, dropout=0.0, compile=True, rank=3))
    assert model._compiled_call_impl is None
