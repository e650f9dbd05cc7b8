"""Dropout masks that are made twice from a seed, so that none has to be kept for the backward pass.

A mask is a function of (seed, shape, device type). The seed is one draw of torch's default CPU generator: gradient
checkpointing and a resumed run, which restore that generator, meet the same masks again, and a GPU is never waited for.
Sixteen bits decide an element, so a rate is rounded to a multiple of 2**-16 and kept values are scaled by the rate that
was really used. Four decisions cost one 64-bit word: on one core a sixth of the time of torch's own dropout.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_LEVELS = 1 << 16


@dataclass(frozen=True, slots=True)
class Dropout:
    """One application of dropout: of 65536 equally likely values, ``dropped`` drop an element.

    ``padded`` is (own, all) where an input (rows, own, n) was filled up to (rows, all, n): its mask is then that of the
    input as it was, and drops what was filled up.
    """

    dropped: int
    seed: int
    padded: tuple[int, int] | None = None

    @property
    def gain(self) -> float:
        """What kept values are multiplied by: 1 / (1 - p)."""
        return _LEVELS / (_LEVELS - self.dropped)

    def mask(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Return zeros and ones of the shape of ``like``, where it lies; not scaled by ``gain``."""
        if self.padded is None:
            return self._mask(like.numel(), like.device, dtype).view(like.shape)
        own, width = self.padded
        whole = torch.zeros(like.shape, dtype=dtype, device=like.device)
        inner = whole.view(-1, width, like.shape[-1])[:, :own]  # (rows, own, n)
        inner.copy_(self._mask(inner.numel(), like.device, dtype).view(inner.shape))
        return whole

    def _mask(self, count: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        draws = _words(max(1, math.ceil(count / 4)), self.seed, device).view(torch.int16)[:count]
        kept = torch.empty(count, dtype=dtype, device=device)
        torch.ge(draws, self.dropped - _LEVELS // 2, out=kept)
        return kept


def draw(rate: float, generator: torch.Generator | None = None) -> Dropout | None:
    """Return a dropout with a fresh seed, or None where a rate drops nothing."""
    dropped = min(round(rate * _LEVELS), _LEVELS - 1)
    return None if dropped == 0 else Dropout(dropped, fresh_seed(generator))


def fresh_seed(generator: torch.Generator | None = None) -> int:
    """Draw a seed, from torch's default CPU generator unless another is given."""
    seed = torch.randint(2**63 - 1, (), dtype=torch.int64, generator=generator)
    return 0 if _valueless() else int(seed)


def _words(count: int, seed: int, device: torch.device) -> Tensor:
    """Return ``count`` random 64-bit words: a GPU's own, elsewhere SFC64, the fastest there is on a CPU."""
    if _valueless():
        return torch.empty(count, dtype=torch.int64, device=device)
    if device.type != "cuda":
        return torch.from_numpy(np.random.SFC64(seed).random_raw(count).view(np.int64)).to(device)
    generator = torch.Generator(device).manual_seed(seed)
    return torch.empty(count, dtype=torch.int64, device=device).random_(-(2**63), None, generator=generator)


def _valueless() -> bool:
    """Whether tensors have shapes only now, as when a run's memory is estimated: a new one is then of another class."""
    return type(torch.empty(0)) is not Tensor
