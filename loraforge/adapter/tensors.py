"""An adapter's tensors under their names on disk, and as raw bytes."""

from collections.abc import Mapping

import torch
from torch import Tensor

from loraforge.adapter.model import Adapter
from loraforge_registry.layout import SUFFIXES

DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""safetensors' names of the element types that an adapter's tensors have."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def named_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """Return every tensor by its key without ``base_model.model.``; factors, then extras."""
    found: dict[str, Tensor] = {}
    for target, pair in adapter.targets.items():
        prefix = "embedding_" if pair.kind == "embedding" else ""
        roles = {f"{prefix}a": pair.a, f"{prefix}b": pair.b, "b_bias": pair.bias, "magnitude": pair.magnitude}
        found |= {target + SUFFIXES[role]: tensor for role, tensor in roles.items() if tensor is not None}
    return found | dict(adapter.extras)


def same_tensor(first: Tensor | None, second: Tensor | None) -> bool:
    """Whether two tensors have one type and equal elements; two that are not there are the same."""
    if first is None or second is None:
        return first is second
    return first.dtype == second.dtype and torch.equal(first, second)


def dtype_name(tensor: Tensor) -> str:
    """Safetensors' name of a tensor's element type."""
    return _NAMES[tensor.dtype]


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor, little-endian and row-major, without a copy where it lies so on the CPU."""
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return flat.numpy().data
