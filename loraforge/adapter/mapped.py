"""Tensors of a safetensors file, mapped: opening costs the header, a page is read when it is used."""

import mmap
import threading
import weakref
from collections.abc import Iterable

import torch
from torch import Tensor

from loraforge.adapter.tensors import DTYPES
from loraforge.errors import HeaderError
from loraforge_registry.header import Header, TensorEntry

_AROUND = max(64 * 1024, mmap.PAGESIZE)  # what Linux maps around a page that is read, neighbours' pages as well
_MAPPINGS: "weakref.WeakValueDictionary[int, mmap.mmap]" = weakref.WeakValueDictionary()  # by address
_LOCK = threading.Lock()  # adapters may be opened in one thread while another looks for its mappings
_EXPENDABLE: "weakref.WeakSet[mmap.mmap]" = weakref.WeakSet()


def map_tensors(fd: int, header: Header) -> dict[str, Tensor]:
    """Return the tensors of an open file by name; they stay valid after it is closed.

    The mapping is private: writing into a tensor never reaches the file. The file must not be truncated while the
    tensors live; what lies in a store never is.

    Raises:
        HeaderError: an element type that no adapter tensor has.
    """
    if not any(entry.end > entry.begin for entry in header.tensors):
        return {entry.name: torch.empty(entry.shape, dtype=_dtype(entry)) for entry in header.tensors}
    mapping = mmap.mmap(fd, 0, access=mmap.ACCESS_COPY)
    with _LOCK:
        _MAPPINGS[torch.frombuffer(mapping, dtype=torch.uint8).data_ptr()] = mapping
    return {entry.name: _tensor(mapping, header.data_start, entry) for entry in header.tensors}


def make_expendable(tensors: Iterable[Tensor]) -> None:
    """Say that nobody has written into these tensors, nor will: ``discard`` may let go of their memory."""
    _EXPENDABLE.update(mapping for tensor in tensors for _, mapping in _mapping_of(tensor))


def discard(tensor: Tensor) -> None:
    """Let go of the memory of an expendable tensor; of others nothing. It is read from its file when it is next used.

    Shapes: of a view that is dense in memory, such as a transpose, or rows.
    """
    for address, mapping in _mapping_of(tensor):
        if mapping in _EXPENDABLE:
            begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.itemsize
            first = max(begin // _AROUND * _AROUND - address, 0)
            last = min(-(-end // _AROUND) * _AROUND - address, len(mapping))
            mapping.madvise(mmap.MADV_DONTNEED, first, last - first)


def _mapping_of(tensor: Tensor) -> list[tuple[int, mmap.mmap]]:
    place = tensor.data_ptr()
    with _LOCK:
        known = list(_MAPPINGS.items())
    return [(start, found) for start, found in known if start <= place < start + len(found)]


def _tensor(mapping: mmap.mmap, data_start: int, entry: TensorEntry) -> Tensor:
    dtype = _dtype(entry)
    if entry.begin == entry.end:
        return torch.empty(entry.shape, dtype=dtype)
    start = data_start + entry.begin
    if start % dtype.itemsize:  # legal in the format, but kernels expect aligned elements
        copied = bytearray(mapping[start : data_start + entry.end])
        return torch.frombuffer(copied, dtype=dtype).reshape(entry.shape)
    return torch.frombuffer(mapping, dtype=dtype, count=entry.elements, offset=start).reshape(entry.shape)


def _dtype(entry: TensorEntry) -> torch.dtype:
    if entry.dtype not in DTYPES:
        raise HeaderError(f"tensor {entry.name!r} is {entry.dtype}; expected one of {', '.join(DTYPES)}")
    return DTYPES[entry.dtype]
