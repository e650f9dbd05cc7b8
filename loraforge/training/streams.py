"""Random numbers as pure functions of (seed, what for, which): a resumed run has no generator state to restore.

Each step and each fetch of a batch seeds torch (every device), numpy and Python from its own number. The caller's
generators are put back at the end of the run.
"""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def seed_all(seed: int, *path: object) -> None:
    """Seed every global generator for one purpose, such as ``("step", 7)``."""
    number = number_of(seed, *path)
    torch.manual_seed(number)
    np.random.seed(number % 2**32)  # noqa: NPY002 - the global generator is what a user's dataset may draw from
    random.seed(number)


def number_of(seed: int, *path: object) -> int:
    """Return the number that generators are seeded with for one purpose."""
    text = "/".join(map(str, (seed, *path)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1


@contextmanager
def apart() -> Iterator[None]:
    """Put every global generator back at the end."""
    state = random.getstate()
    legacy: Any = np.random.get_state()  # noqa: NPY002 - as above
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(state)
            np.random.set_state(legacy)  # noqa: NPY002 - as above
