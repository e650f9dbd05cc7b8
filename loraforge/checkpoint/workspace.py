"""Buffers that a worker uses again for every block: fresh pages would cost more than the arithmetic."""

import math

import torch
from torch import Tensor


class Workspace:
    """Scratch tensors by name; what was there under a name is overwritten by its next user."""

    def __init__(self) -> None:
        self._flat: dict[tuple[str, torch.dtype], Tensor] = {}

    def __call__(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """Return an uninitialised tensor of this shape."""
        count = math.prod(shape)
        flat = self._flat.get((name, dtype))
        if flat is None or flat.numel() < count:
            flat = self._flat[name, dtype] = torch.empty(count, dtype=dtype)
        return flat[:count].view(shape)
