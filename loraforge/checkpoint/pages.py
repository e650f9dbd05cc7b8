"""Sums of a tensor's bytes by page of its file: what tells, after a crash, which pages were written.

A page is written whole or not at all when a process is killed, so a half-written tensor is pages of the old and pages
of the new bytes. The sums are multiplicative hashes of 64 bits; they steer, and BLAKE3 of the whole tensor proves.
"""

from itertools import pairwise

import numpy as np

from loraforge.checkpoint.floats import Array

PAGE = 4096
_WORDS = PAGE // 8
_WEIGHTS = np.random.Generator(np.random.PCG64(0x10AF)).integers(0, 2**64, _WORDS, dtype=np.uint64) | np.uint64(1)


def units(begin: int, size: int) -> list[tuple[int, int]]:
    """Return the pieces of bytes begin to begin + size of a file that share no page, as offsets from ``begin``."""
    edges = [0, *range(PAGE - begin % PAGE, size, PAGE), size] if size else [0]
    return list(pairwise(edges))


def page_sums(data: memoryview, begin: int) -> Array:
    """Return the sum of each unit of ``data``, which lies at ``begin`` in its file.

    Shapes: -> (units,) uint64.
    """
    head = (PAGE - begin % PAGE) % PAGE
    if head >= len(data):
        return _sums(data)
    middle = (len(data) - head) // PAGE * PAGE
    parts = [data[:head], data[head : head + middle], data[head + middle :]]
    return np.concatenate([_sums(part) for part in parts if len(part)] or [np.empty(0, np.uint64)])


def _sums(data: memoryview) -> Array:
    raw = np.frombuffer(data, np.uint8)
    if len(raw) % PAGE:  # a piece of a page, at an end of the tensor
        raw = np.concatenate((raw, np.zeros(PAGE - len(raw) % PAGE, np.uint8)))
    words = raw.view(np.uint64).reshape(-1, _WORDS)
    mixed = (words ^ (words >> np.uint64(31))) * _WEIGHTS
    return np.asarray((mixed ^ (mixed >> np.uint64(29))).sum(axis=1, dtype=np.uint64))
