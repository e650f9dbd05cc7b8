"""The kinds of module that can be adapted: how each is recognised, and its two linear maps.

A kind knows ``base(x, W)``, the module without its bias, and ``low_rank(x, A, B)``, which is ``base(x, B A)`` done in
two steps of rank r. Shapes of the factors are those of ``loraforge.adapter.LowRank``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor, nn

from loraforge.adapter import Kind


@dataclass(frozen=True)
class Ops:
    """One kind of module.

    ``weight`` gives W with outputs first: (out, in), (dim, rows), (out, in / groups, *kernel).
    ``spread`` gives a vector over the outputs the shape that broadcasts over the module's output.
    """

    name: Kind
    weight: Callable[[Any], Tensor]
    base: Callable[[Any, Tensor], Tensor]
    low_rank: Callable[[Any, Tensor, Tensor, Tensor], Tensor]
    spread: Callable[[Tensor], Tensor]


def kind_of(module: nn.Module) -> Ops | None:
    """Return the kind of a module that runs its class's own forward, None for any other."""
    return _BY_FORWARD.get(type(module).forward) or (_LINEAR if is_transposed(module) else None)


def is_transposed(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D: a linear layer whose weight is (in, out)."""
    forward = type(module).forward
    return getattr(forward, "__qualname__", "") == "Conv1D.forward" and forward.__module__.startswith("transformers.")


def factor_shapes(module: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of A and B for a module and a rank."""
    ops = kind_of(module)
    assert ops is not None, "only modules of a known kind are asked about"  # noqa: S101 - a caller's contract
    w = ops.weight(module)
    groups = int(getattr(module, "groups", 1))
    ones = (1,) * (w.ndim - 2)
    return (rank, w.shape[1] * groups, *w.shape[2:]), (w.shape[0], rank // groups, *ones)


def _linear_weight(module: Any) -> Tensor:  # noqa: ANN401 - any class with such a weight
    weight: Tensor = module.weight
    return weight.T if is_transposed(module) else weight


def _linear_base(module: Any, x: Tensor) -> Tensor:  # noqa: ANN401 - as above
    return F.linear(x, _linear_weight(module))


def _linear_low_rank(_: Any, x: Tensor, a: Tensor, b: Tensor) -> Tensor:  # noqa: ANN401 - as above
    return F.linear(F.linear(x, a), b)


def _lookup(module: nn.Embedding, x: Tensor, table: Tensor) -> Tensor:
    rows: Tensor = F.embedding(x, table, module.padding_idx, scale_grad_by_freq=module.scale_grad_by_freq)
    return rows


def _embedding_low_rank(module: nn.Embedding, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return F.linear(_lookup(module, x, a.T), b)


Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d


def _conv_base(module: Conv, x: Tensor) -> Tensor:
    y: Tensor = _convolve(module)(
        x, module.weight, None, module.stride, module.padding, module.dilation, groups=module.groups
    )
    return y


def _conv_low_rank(module: Conv, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    conv = _convolve(module)
    u = conv(x, a, None, module.stride, module.padding, module.dilation)
    update: Tensor = conv(u, b, groups=module.groups)
    return update


def _convolve(module: Conv) -> Any:  # noqa: ANN401 - three overloaded builtins
    return {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[module.weight.ndim - 2]


def _conv(name: Kind, dimensions: int) -> Ops:
    def spread(v: Tensor) -> Tensor:
        return v.view(-1, *(1,) * dimensions)

    return Ops(name, lambda module: module.weight, _conv_base, _conv_low_rank, spread)


_LINEAR = Ops("linear", _linear_weight, _linear_base, _linear_low_rank, lambda v: v)
_BY_FORWARD: dict[Any, Ops] = {
    nn.Linear.forward: _LINEAR,
    nn.Embedding.forward: Ops(
        "embedding",
        lambda module: module.weight.T,
        lambda module, x: _lookup(module, x, module.weight),
        _embedding_low_rank,
        lambda v: v,
    ),
    nn.Conv1d.forward: _conv("conv1d", 1),
    nn.Conv2d.forward: _conv("conv2d", 2),
    nn.Conv3d.forward: _conv("conv3d", 3),
}


def why_not(module: nn.Module) -> str | None:
    """Say why a module cannot be adapted, and what would help; None if it can."""
    if "forward" in module.__dict__ or hasattr(module, "lora"):
        return "is adapted already, or its forward was replaced (by accelerate's offloading?); undo that first"
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "belongs to nn.MultiheadAttention, which reads its weight and never calls it; exclude it"
    weight = module._parameters.get("weight")  # noqa: SLF001 - not a property that computes it
    if weight is not None and (not weight.is_floating_point() or type(weight.data) is not Tensor):
        return f"has a quantised weight ({type(weight).__name__}, {weight.dtype}); load the base unquantised"
    if kind_of(module) is None:
        return f"is a {type(module).__name__}; expected Linear, Conv1D, Embedding, Conv1d, Conv2d or Conv3d as they are"
    if weight is None or weight.is_meta:
        return "has no weight of its own (a parametrisation, or not loaded yet); remove that, or load it"
    return _odd_settings(module)


def _odd_settings(module: nn.Module) -> str | None:
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "renormalises its rows when it is read (max_norm); an update of rank r cannot follow"
    if getattr(module, "padding_mode", "zeros") != "zeros":
        return f"pads with {module.padding_mode!r}; PEFT pads the low-rank path with zeros: exclude it"
    return None
