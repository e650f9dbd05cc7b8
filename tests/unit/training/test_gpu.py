"""On a GPU: what the CPU computes, and masks that are made twice."""

import pytest
import torch

import loraforge as lf
from loraforge.layers.dropout import Dropout
from loraforge.training import TrainConfig, train
from tests.unit.training.test_loop import batches, net

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mask_is_the_same_twice_and_keeps_its_share(dtype):
    like, dropout = torch.empty(1_000_003, device="cuda"), Dropout(6554, seed=3)
    mask = dropout.mask(like, dtype)
    assert torch.equal(mask, dropout.mask(like, dtype))
    assert abs(1 - float(mask.double().mean()) - 6554 / 65536) < 2e-3


def test_training_is_the_cpus():
    data = list(batches())
    model = net()
    model.drop.p = 0.0
    config = TrainConfig(rank=2, lr=1e-2, epochs=2, init="pissa", precision="fp32")
    here = train(model, data, config.__class__(**{**config.__dict__, "device": "cpu"}))
    there = train(model, data, config)
    assert next(model.parameters()).device.type == "cpu"
    for name, pair in here.targets.items():
        assert torch.allclose(pair.delta(), there.targets[name].delta().cpu(), rtol=1e-3, atol=1e-4)
    dropped = TrainConfig(rank=2, lr=1e-2, epochs=2, dropout=0.2)
    assert lf.content_id(train(model, data, dropped)) == lf.content_id(train(model, data, dropped))
