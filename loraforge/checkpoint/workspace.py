"""Buffers that a worker uses again for every block: fresh pages would cost more than the arithmetic."""

import math

import torch
from torch import Tensor


class Workspace:
    """Scratch tensors by name; what was there under a name is overwritten by its next user.

    A shape that was asked for before gives the same tensor: torch lets go of the interpreter's lock for every view that
    it makes, and getting it back from another thread takes longer than all else that is done here.
    """

    def __init__(self) -> None:
        self._flat: dict[tuple[str, torch.dtype], Tensor] = {}
        self._shaped: dict[tuple[str, torch.dtype, tuple[int, ...]], Tensor] = {}

    def __call__(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """Return an uninitialised tensor of this shape."""
        found = self._shaped.get((name, dtype, shape))
        if found is None:
            found = self._shaped[name, dtype, shape] = self._room(name, dtype, math.prod(shape)).view(shape)
        return found

    def _room(self, name: str, dtype: torch.dtype, count: int) -> Tensor:
        flat = self._flat.get((name, dtype))
        if flat is None or flat.numel() < count:
            flat = self._flat[name, dtype] = torch.empty(count, dtype=dtype)
            self._shaped = {key: view for key, view in self._shaped.items() if key[:2] != (name, dtype)}
        return flat[:count]
