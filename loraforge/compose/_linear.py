r"""The exact weighted sum of adapters, ``sum_i w_i scale_i B_i A_i``, kept in factors.

Equation: ``sum_i c_i B_i A_i = [.. sgn(c_i) |c_i|^(1/2) B_i ..] [.. |c_i|^(1/2) A_i ..]`` with
``c_i = w_i scale_i``: block matrices, so ranks add and no cross terms ``B_i A_j`` arise (summing A's and B's apart,
as PEFT's ``linear`` does, gives a product of sums).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from loraforge.adapter import Adapter, LowRank, identity
from loraforge.compose._additive import (
    Term,
    check_additive,
    check_finite,
    common_extras,
    common_settings,
    without_extras,
)
from loraforge.errors import CompositionError
from loraforge_registry.config import MAX_ALPHA, MIN_ALPHA
from loraforge_registry.manifest import Derivation, Input

_Scaled = tuple[LowRank, float]


def stack(adapters: Sequence[Adapter], *, base: str | None = None, drop_saved: bool = False) -> Adapter:
    """Return the exact sum of adapters: ``linear`` with every weight 1."""
    return linear([(adapter, 1.0) for adapter in adapters], base=base, drop_saved=drop_saved)


def linear(terms: Sequence[Term], *, base: str | None = None, drop_saved: bool = False) -> Adapter:
    r"""Return the weighted sum ``sum_i w_i dW_i`` of adapters, exactly, without the base.

    Targets that an adapter lacks get nothing from it. Equal pairs are added by their weights, so that an adapter's
    average with itself is itself; what cancels completely leaves a zero of rank 1. A target with one contributor
    keeps its factors bit for bit, and only its alpha changes.

    Shapes: ranks add: a (sum r_i, n), b (m, sum r_i), alpha = rank, so the scale is 1.
    Numerics: coefficients in float64; factors of a sum are rounded once, to float32 (float64 if a source is), which
        leaves a relative error below 2e-7 of ``sum |c_i| |B_i| |A_i|``.
    Cost: O((m + n) sum r_i) for each target; nothing dense.

    Args:
        terms: adapters with their weights; any finite weights, of any sign.
        base: the name of the base, where the adapters give different ones for one model.
        drop_saved: leave out whole saved tensors (modules_to_save, biases of the base, token rows).

    Raises:
        CompositionError: no adapters; a weight that is no number; bases, shapes or saved tensors that differ; what
            is not additive (DoRA, grouped convolutions, unconverted PiSSA and its like).
        NumericalError: NaN or infinity in a factor.
    """
    if not terms:
        raise CompositionError("no adapters to combine")
    for _, weight in terms:
        if not math.isfinite(weight):
            raise CompositionError(f"a weight is {weight}; expected a finite number")
    recorded = tuple(Input(identity(adapter), weight + 0.0) for adapter, weight in terms)  # + 0.0: no -0.0
    parameters = {"base": base} if base else {}
    derivation = Derivation("linear", 1, recorded, parameters | ({"drop_saved": True} if drop_saved else {}))
    if len(terms) == 1 and terms[0][1] == 1 and not parameters and not drop_saved:
        check_finite(terms[0][0])
        return replace(terms[0][0], origin=None, derivation=derivation)  # itself, additive or not
    if drop_saved:
        terms = [(without_extras(adapter), weight) for adapter, weight in terms]
    for adapter, _ in terms:
        check_additive(adapter)
    extras, settings = common_extras(terms, common_settings(terms, base))
    names = sorted({name for adapter, _ in terms for name in adapter.targets})
    targets = {name: _sum(name, [(a.targets[name], w) for a, w in terms if name in a.targets]) for name in names}
    result = Adapter(_with_biases(targets), settings, extras, derivation=derivation)
    check_finite(result)  # factors near the end of float32 can leave it
    return result


def _sum(name: str, pairs: Sequence[_Scaled]) -> LowRank:
    """Sum the pairs of one target."""
    _check_shapes(name, [pair for pair, _ in pairs])
    merged = _merge_equal(pairs)
    if not merged:
        return _zero(pairs[0][0])
    if len(merged) == 1:
        pair, weight = merged[0]
        alpha = weight * pair.scale * pair.rank
        if not MIN_ALPHA <= abs(alpha) <= MAX_ALPHA:
            raise CompositionError(
                f"target {name!r}: the weight {weight:g} gives an alpha of {alpha:g}, beyond any use"
            )
        return replace(pair, alpha=alpha, rslora=False)
    if any(pair.groups > 1 for pair, _ in merged):
        raise CompositionError(f"target {name!r} is a grouped convolution: its factors cannot be stacked")
    return _concatenate([(pair, weight * pair.scale) for pair, weight in merged])


def _concatenate(pairs: Sequence[_Scaled]) -> LowRank:
    """Stack pairs with the coefficients ``c_i``, split evenly between the factors to keep the range of both."""
    dtype = torch.float64 if any(pair.a.dtype == torch.float64 for pair, _ in pairs) else torch.float32
    device = pairs[0][0].a.device
    a = torch.cat([_scaled(pair.a, math.sqrt(abs(c)), dtype, device) for pair, c in pairs], dim=0)
    b = torch.cat([_scaled(pair.b, math.copysign(math.sqrt(abs(c)), c), dtype, device) for pair, c in pairs], dim=1)
    biases = [_scaled(pair.bias, c, torch.float64, device) for pair, c in pairs if pair.bias is not None]
    bias = torch.stack(biases).sum(0).to(dtype) if biases else None
    return LowRank(pairs[0][0].kind, a, b, alpha=float(a.shape[0]), bias=bias)


def _with_biases(targets: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """Give every pair a bias if one has: PEFT's lora_bias is for all or none, and a zero adds nothing."""
    if not any(pair.bias is not None for pair in targets.values()):
        return dict(targets)
    embedding = next((name for name, pair in targets.items() if pair.kind == "embedding"), None)
    if embedding is not None:
        raise CompositionError(
            f"target {embedding!r} is an embedding, and another target has a lora_bias: PEFT has no both"
        )
    zeros = {name: pair.b.new_zeros(pair.b.shape[0]) for name, pair in targets.items()}
    return {name: pair if pair.bias is not None else replace(pair, bias=zeros[name]) for name, pair in targets.items()}


def _merge_equal(pairs: Sequence[_Scaled]) -> list[_Scaled]:
    """Add the weights of pairs that are the same, and leave out what cancels."""
    groups: list[tuple[LowRank, list[float]]] = []
    for pair, weight in pairs:
        for known, weights in groups:
            if _is_same(pair, known):
                weights.append(weight)
                break
        else:
            groups.append((pair, [weight]))
    # exactly rounded: 0.1 + 0.2 - 0.3 is not 0 in float64, but nothing that anybody asked for
    sums = [(pair, math.fsum(weights), math.fsum(map(abs, weights))) for pair, weights in groups]
    return [(pair, total) for pair, total, size in sums if abs(total) > 1e-15 * size]


def _is_same(x: LowRank, y: LowRank) -> bool:
    if (x.scale, x.a.dtype, x.b.dtype, x.a.shape, x.b.shape) != (
        y.scale,
        y.a.dtype,
        y.b.dtype,
        y.a.shape,
        y.b.shape,
    ):
        return False
    if (x.bias is None) != (y.bias is None) or x.a.device != y.a.device:
        return False
    same_bias = x.bias is None or y.bias is None or torch.equal(x.bias, y.bias)
    return same_bias and torch.equal(x.a, y.a) and torch.equal(x.b, y.b)


def _zero(pair: LowRank) -> LowRank:
    a, b = torch.zeros_like(pair.a[:1]), torch.zeros_like(pair.b[:, :1])
    bias = None if pair.bias is None else torch.zeros_like(pair.bias)
    return LowRank(pair.kind, a, b, alpha=1.0, bias=bias)


def _scaled(tensor: Tensor, factor: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return (tensor.to(torch.float64) * factor).to(device=device, dtype=dtype)


def _check_shapes(name: str, pairs: Sequence[LowRank]) -> None:
    first = pairs[0]
    for pair in pairs[1:]:
        if (pair.kind, pair.shape) != (first.kind, first.shape):
            raise CompositionError(
                f"target {name!r} is {first.kind} {list(first.shape)} in one adapter and {pair.kind} "
                f"{list(pair.shape)} in another: they belong to different bases"
            )
