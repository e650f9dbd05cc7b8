"""Frozen weights in autocast's type, cast once for a run instead of in each forward.

Under autocast a linear layer computes with ``W`` rounded to bfloat16. Autocast keeps that copy for weights that are
trained, for the rest of a forward; a frozen one is cast each time, and the copy is kept for the backward pass. Here it
is made once: the same bits go into the same products. ``W`` itself stays where it is, so a run holds half its bytes
more all the time, and in each step less by as much, but for what gradient checkpointing would have released.
"""

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor, nn

from loraforge.layers.kinds import is_transposed, kind_of

_NAME = "narrow_weight"
SHARED = "shared_lora"
"""What marks a module that several adapters share: its forward asks for the copy."""


def narrow(model: nn.Module, dtype: torch.dtype | None) -> list[Tensor]:
    """Give every frozen float32 linear layer of ``model`` a copy of its weight in ``dtype``; return the copies.

    None makes none. A layer with another forward than its class's, but for an adapted one, is left alone.

    Cost: a cast of the weights, and dtype's bytes for each element of them until ``widen``.
    """
    found: list[Tensor] = []
    for module in model.modules() if dtype is not None else ():
        ops = kind_of(module)
        alone = "lora" in module._modules and getattr(module.lora, "magnitude", None) is None  # noqa: SLF001 - a look at its children
        adapted = alone or SHARED in module.__dict__
        if ops is None or ops.name != "linear" or not (adapted or "forward" not in module.__dict__):
            continue
        weight: Any = module.weight
        if weight.dtype == torch.float32 and not weight.requires_grad:
            copy = weight.detach().to(dtype)
            module.__dict__[_NAME] = copy
            found.append(copy)
            if not adapted:
                module.__dict__["forward"] = MethodType(_forward, module)
    return found


def widen(model: nn.Module) -> None:
    """Take the copies away again."""
    for module in model.modules():
        adapted = "lora" in module._modules or SHARED in module.__dict__  # noqa: SLF001 - as above
        if module.__dict__.pop(_NAME, None) is not None and not adapted:
            module.__dict__.pop("forward", None)


def weight_in(module: Any, w: Tensor, dtype: torch.dtype) -> Tensor:  # noqa: ANN401 - any linear module
    """Return the copy of ``w`` (out, in), the module's weight, in ``dtype`` if there is one, else ``w``."""
    copy: Tensor | None = module.__dict__.get(_NAME)
    if copy is None or copy.dtype != dtype:
        return w
    return copy.T if is_transposed(module) else copy


def _forward(module: Any, x: Tensor) -> Tensor:  # noqa: ANN401 - as above
    """What the module's own forward computes under autocast; outside of it, that forward."""
    device, copy = x.device.type, module.__dict__[_NAME]
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == copy.dtype:
        return F.linear(x, copy.T if is_transposed(module) else copy, module.bias)
    y: Tensor = type(module).forward(module, x)
    return y
