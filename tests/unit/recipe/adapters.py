"""Adapters for recipes: a few layers, two kinds of targets, every number drawn."""

import torch

import loraforge as lf
from loraforge_registry.config import Settings

SHAPES = {"self_attn.q_proj": (12, 8), "mlp.up_proj": (16, 8)}


def drawn(seed, rank=2, layers=3, base="some/base", dtype=torch.float32, **more):
    """An adapter with an update of every size in each layer."""
    g = torch.Generator().manual_seed(seed)
    targets = {
        f"model.layers.{layer}.{name}": lf.LowRank(
            "linear",
            torch.randn(rank, n, generator=g, dtype=torch.float64).to(dtype),
            torch.randn(m, rank, generator=g, dtype=torch.float64).to(dtype),
            alpha=float(1 + seed % 3) * rank,
            **more,
        )
        for layer in range(layers)
        for name, (m, n) in SHAPES.items()
    }
    return lf.Adapter(targets, Settings(base_name=base))


def dense(adapter):
    return {name: pair.delta() for name, pair in adapter.targets.items()}


def distance(found, wanted):
    """``|found - wanted| / |wanted|`` over all targets; one that is missing counts as zero."""
    names = {*found, *wanted}
    zero = torch.zeros((), dtype=torch.float64)
    lost = sum(float((found.get(n, zero) - wanted.get(n, zero)).square().sum()) for n in names)
    total = sum(float(w.square().sum()) for w in wanted.values())
    return (lost / total) ** 0.5 if total else lost**0.5
