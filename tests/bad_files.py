"""Adapters, good and bad, built from plain bytes: so that what no library would write can be written, too."""

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PREFIX = "base_model.model."
TARGETS = ("model.layers.0.q", "model.layers.0.v")

# name: (dtype, shape, raw bytes)
Tensors = dict[str, tuple[str, Sequence[int], bytes]]


def file_bytes(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with any header, and any length announced."""
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def header_fields(tensors: Tensors) -> dict[str, Any]:
    """The header of a well-formed file."""
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (dtype, shape, raw) in tensors.items():
        fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + len(raw)]}
        position += len(raw)
    return fields


def safetensors_bytes(tensors: Tensors) -> bytes:
    header = json.dumps(header_fields(tensors)).encode()
    return file_bytes(header, b"".join(raw for _, _, raw in tensors.values()))


def floats(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def pair(target: str, *, rank: int = 2, rows: int = 4, columns: int = 6, value: float = 0.5) -> Tensors:
    """The two factors of one target: A (rank, columns) and B (rows, rank), every number different."""
    a = [value * (1 + i) / 8 for i in range(rank * columns)]
    b = [value * (3 + i) / 8 for i in range(rows * rank)]
    return {
        f"{PREFIX}{target}.lora_A.weight": ("F32", (rank, columns), floats(*a)),
        f"{PREFIX}{target}.lora_B.weight": ("F32", (rows, rank), floats(*b)),
    }


def tensors(value: float = 0.5, **shape: int) -> Tensors:
    """The tensors of the good adapter: two targets of rank 2."""
    return {name: row for target in TARGETS for name, row in pair(target, value=value, **shape).items()}


def config(**changes: object) -> dict[str, object]:
    """The config of the good adapter, with changes; None takes a key out."""
    fields: dict[str, object] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q", "v"]}
    return {key: value for key, value in (fields | changes).items() if value is not None}


def write_adapter(
    directory: Path,
    *,
    weights: bytes | Tensors | None = None,
    settings: bytes | Mapping[str, object] | None = None,
) -> Path:
    """Write a PEFT directory: the good adapter, or one with other tensors, other settings, or any bytes as either."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = tensors() if weights is None else weights
    settings = config() if settings is None else settings
    (directory / "adapter_model.safetensors").write_bytes(
        weights if isinstance(weights, bytes) else safetensors_bytes(weights)
    )
    (directory / "adapter_config.json").write_bytes(
        settings if isinstance(settings, bytes) else json.dumps(settings).encode()
    )
    return directory
