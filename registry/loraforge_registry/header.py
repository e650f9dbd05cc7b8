"""The gate in front of every safetensors file: its header, checked before anything is allocated.

The safetensors library is safe but not strict (it accepts a tensor name twice, for one). What passes here passes
there; what is refused here and not there is listed in SPEC.md section 8.
"""

import json
import os
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from loraforge_registry import strict_json
from loraforge_registry.errors import FormatError, HeaderError

MAX_HEADER = 10 * 1024 * 1024
MAX_TENSORS = 100_000
MAX_NAME = 512
MAX_DIMENSIONS = 16

BITS: Mapping[str, int] = {
    # in the order in which safetensors lays tensors out, last first
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8,
    "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
_LAYOUT_ORDER = {dtype: -position for position, dtype in enumerate(BITS)}
# What a file that is no safetensors file most often is, by its first bytes.
_IMPOSTORS = (
    (b"version https://git-lfs", "a Git LFS pointer: fetch the file itself (git lfs pull)"),
    (b"PK\x03\x04", "a zip archive, perhaps a PyTorch pickle: save it as safetensors"),
    (b"\x80", "a Python pickle: save it as safetensors"),
    (b"<", "an HTML or XML page, perhaps a failed download"),
    (b"{", "JSON text"),
)


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file: ``begin`` and ``end`` are bytes from the start of the tensor data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def elements(self) -> int:
        """The product of the dimensions."""
        return _product(self.shape)


@dataclass(frozen=True, slots=True)
class Header:
    """A header that passed: its tensors in file order, and where their data begins."""

    tensors: tuple[TensorEntry, ...]
    metadata: Mapping[str, str]
    data_start: int
    raw: bytes = field(repr=False)

    @property
    def size(self) -> int:
        """The bytes of the whole file."""
        return self.data_start + (self.tensors[-1].end if self.tensors else 0)


def read_header(fd: int) -> Header:
    """Read and check the header of an open safetensors file, by pread; the file position does not move.

    Cost: reads 8 bytes and the header, never the tensors.

    Raises:
        HeaderError: anything but a well-formed file.
        OSError: the file cannot be read.
    """
    size = os.fstat(fd).st_size
    length = header_length(os.pread(fd, 32, 0), size)
    raw = bytearray()
    while len(raw) < length:
        piece = os.pread(fd, length - len(raw), 8 + len(raw))
        if not piece:
            raise HeaderError(f"the file ended {length - len(raw)} bytes before its header did")
        raw += piece
    return parse_header(bytes(raw), size)


def header_length(start: bytes, file_size: int) -> int:
    """Return the length that the first 8 bytes of a file announce, if a header of that length can be there."""
    length = int.from_bytes(start[:8], "little")
    limit = min(MAX_HEADER, file_size - 8)
    if file_size < 10 or length < 2 or length > limit:
        hint = next((f"; it looks like {what}" for magic, what in _IMPOSTORS if start.startswith(magic)), "")
        raise HeaderError(
            f"not a safetensors file: {file_size} bytes that announce a header of {length}, "
            f"expected 2 to {max(limit, 2)}{hint}"
        )
    return length


def parse_header(raw: bytes, file_size: int) -> Header:
    """Check the header's JSON against the size of its file (``8 + len(raw)`` and the tensors' bytes)."""
    text = raw.rstrip(b" ")
    if not text.startswith(b"{") or not text.endswith(b"}"):
        raise HeaderError("the header must begin with '{' and end with '}' and padding spaces only")
    _check_count(text.count(b'"data_offsets"'))  # before it takes seconds to read them
    try:
        fields = strict_json.loads(text, max_bytes=MAX_HEADER, max_depth=4)
    except FormatError as error:
        raise HeaderError(f"bad safetensors header: {error}") from error
    if not isinstance(fields, dict):
        raise HeaderError("bad safetensors header: not an object")
    metadata = _metadata(fields.pop("__metadata__", {}))
    _check_count(len(fields))
    tensors = sorted((_entry(name, entry) for name, entry in fields.items()), key=lambda t: (t.begin, t.end))
    data_start = 8 + len(raw)
    _check_tiling(tensors, file_size - data_start)
    return Header(tuple(tensors), metadata, data_start, raw)


def _check_count(tensors: int) -> None:
    if tensors > MAX_TENSORS:
        raise HeaderError(f"{tensors} tensors; the limit is {MAX_TENSORS}")


def encode_header(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> bytes:
    """Return the first bytes of a canonical file for tensors given as (name, dtype, shape).

    The layout is the safetensors library's (widest dtype first, then by name), the metadata exactly
    ``{"format": "pt"}``: equal tensors give equal bytes, whoever wrote them. The tensors' data must follow in the
    order that ``parse_header`` reports.
    """
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, dtype, shape in sorted(tensors, key=lambda t: (_LAYOUT_ORDER[t[1]], t[0])):
        end = position + _product(shape) * BITS[dtype] // 8
        fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _metadata(value: strict_json.Json) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise HeaderError("__metadata__ must be an object whose values are strings")
    return {key: str(item) for key, item in value.items()}


def _entry(name: str, entry: strict_json.Json) -> TensorEntry:
    _check_name(name)
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise HeaderError(f"tensor {name!r}: expected exactly dtype, shape and data_offsets")
    dtype = entry["dtype"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise HeaderError(f"tensor {name!r}: unknown dtype {str(dtype)[:40]!r}")
    shape = _integers(name, "shape", entry["shape"])
    offsets = _integers(name, "data_offsets", entry["data_offsets"])
    if len(shape) > MAX_DIMENSIONS or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise HeaderError(f"tensor {name!r}: shape {list(shape)} and data_offsets {list(offsets)} cannot be")
    # each dimension, too: a zero among them must not hide one that no machine can index
    bits = _product(shape) * BITS[dtype]
    if max(shape, default=0) >= 2**63 or _product(max(d, 1) for d in shape) >= 2**63:
        raise HeaderError(f"tensor {name!r}: shape {list(shape)} is beyond 2^63 elements")
    if bits % 8 or bits // 8 != offsets[1] - offsets[0]:
        raise HeaderError(
            f"tensor {name!r}: {dtype} of shape {list(shape)} is {bits / 8:g} bytes, "
            f"its data_offsets hold {offsets[1] - offsets[0]}"
        )
    return TensorEntry(name, dtype, shape, offsets[0], offsets[1])


def _check_name(name: str) -> None:
    # Cc controls, Cf invisible formatting such as U+202E: they make a printed name lie
    bad = any(unicodedata.category(character) in ("Cc", "Cf") for character in name)
    if not name or len(name.encode()) > MAX_NAME or bad:
        raise HeaderError(f"tensor name {name[:80]!r} is empty, over {MAX_NAME} bytes, or has control characters")


def _integers(name: str, what: str, value: strict_json.Json) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise HeaderError(f"tensor {name!r}: {what} is not a list")
    numbers: list[int] = []
    for item in value:
        if not isinstance(item, int) or isinstance(item, bool) or item < 0 or item >= 2**64:
            raise HeaderError(f"tensor {name!r}: {what} holds {str(item)[:40]}, expected a whole number from 0")
        numbers.append(item)
    return tuple(numbers)


def _check_tiling(tensors: list[TensorEntry], data_size: int) -> None:
    """Tensors cover the data exactly; bytes that belong to no tensor could be another file in disguise."""
    position = 0
    for entry in tensors:
        if entry.begin != position:
            what = "overlaps the one before" if entry.begin < position else "leaves a hole before it"
            raise HeaderError(f"tensor {entry.name!r} begins at {entry.begin}, expected {position}: it {what}")
        position = entry.end
    if position != data_size:
        raise HeaderError(
            f"the tensors take {position} bytes, the file holds {data_size} behind its header: "
            f"{'it is cut short' if data_size < position else 'there are bytes that belong to no tensor'}"
        )


def _product(numbers: Iterable[int]) -> int:
    """The product; math.prod would build the same unbounded integer, but only after the loop."""
    result = 1
    for number in numbers:
        result *= number
    return result
