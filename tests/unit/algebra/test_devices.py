"""Adapters on a GPU: results come back where the inputs were, and are those of the CPU."""

from dataclasses import replace

import pytest
import torch

import loraforge as lf
from loraforge.adapter import Adapter, LowRank
from loraforge.compose import compare, overall

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def on(device, adapter):
    moved = {n: replace(p, a=p.a.to(device), b=p.b.to(device)) for n, p in adapter.targets.items()}
    return replace(adapter, targets=moved)


def adapter(seed):
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(4, 64, generator=generator), torch.randn(48, 4, generator=generator)
    return Adapter({"t": LowRank("linear", a, b, alpha=8.0)})


def test_results_stay_on_the_device_and_are_the_cpus():
    here = lf.rerank(lf.linear([(adapter(1), 0.7), (adapter(2), -0.3)]), rank=3).adapter
    there = lf.rerank(lf.linear([(on("cuda", adapter(1)), 0.7), (on("cuda", adapter(2)), -0.3)]), rank=3).adapter
    assert there.targets["t"].a.device.type == there.targets["t"].b.device.type == "cuda"
    assert overall(compare(here, on("cpu", there))) < 1e-6
