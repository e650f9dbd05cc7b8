"""Spectra for the pages: worked out by whoever may import a tensor library, one adapter at a time, kept in the index.

Whoever opens a page never waits: what is not known yet is begun, and the page says to look again. What an adapter would
cost is known from its shapes before a byte of it is read, and above a limit nothing is begun.
"""

import logging
import math
import queue
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import msgpack

from loraforge_registry import index
from loraforge_registry.digest import Digest
from loraforge_registry.errors import LoraforgeError
from loraforge_registry.layout import Layout
from loraforge_registry.manifest import Manifest
from loraforge_registry.server import kinds
from loraforge_registry.server.kinds import Kinds
from loraforge_registry.spectrum import Spectrum

LOG = logging.getLogger("loraforge.server")
MAX_WAITING = 32
MAX_KNOWN = 100  # in memory: for those that look again where the index cannot be written
MAX_VALUES = 200_000  # of all targets
MAX_WORK = 3e12  # multiplications: a minute or two
MAX_TARGET = 60_000_000  # numbers in both factors of one target


class Compute(Protocol):
    """Works out spectra elsewhere, by its own time limit."""

    def __call__(self, digest: Digest) -> Mapping[str, Spectrum]:
        """Return the spectrum of each target of an adapter.

        Raises:
            LoraforgeError: why there is none.
        """

    def stop(self) -> None:
        """Give up what is under way; nothing is begun any more."""


class Spectra:
    """What is known of adapters' spectra, and a thread that finds out what is not."""

    def __init__(self, root: Path, compute: Compute) -> None:
        self._root, self._compute = root, compute
        self._lock = threading.Lock()
        self._waiting: set[Digest] = set()  # by content, as all here: copies of an adapter are worked out once
        self._known: dict[Digest, Kinds | str] = {}
        self._queue: queue.Queue[tuple[Digest, Digest]] = queue.Queue(MAX_WAITING)
        self._thread: threading.Thread | None = None

    def ask(self, digest: Digest, manifest: Manifest, layout: Layout) -> Kinds | str | None:
        """Return what is known, or the sentence that says why nothing is; None where it is being worked out."""
        content = manifest.content_id
        known = self._known.get(content) or self._read(content) or _too_much(layout)
        if known is None:
            self._begin(digest, content)
        return known

    def close(self) -> None:
        """Give up what is under way."""
        self._compute.stop()

    def _read(self, content: Digest) -> Kinds | None:
        row = index.read_spectra(self._root, content)
        try:
            return None if row is None else kinds.unpack(row)
        except (ValueError, TypeError, msgpack.UnpackException):
            return None

    def _begin(self, digest: Digest, content: Digest) -> None:
        with self._lock:
            if content in self._waiting or content in self._known:  # which may have come since it was looked for
                return
            if self._queue.full():  # whoever asks again when there is room is put in then
                return
            self._waiting.add(content)
            self._queue.put_nowait((digest, content))
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="spectra", daemon=True)
                self._thread.start()

    def _work(self) -> None:
        while True:
            digest, content = self._queue.get()
            found = self._find(digest)
            if isinstance(found, Kinds):
                index.write_spectra(self._root, content, kinds.pack(found))
            with self._lock:
                if len(self._known) >= MAX_KNOWN:
                    self._known.clear()
                self._known[content] = found
                self._waiting.discard(content)

    def _find(self, digest: Digest) -> Kinds | str:
        try:
            return kinds.summarise(self._compute(digest))
        except LoraforgeError as error:
            return str(error.args[-1])
        except Exception:  # the thread lives on, whatever one adapter does
            LOG.exception("spectrum of %s", digest)
            return "it could not be worked out"


def _too_much(layout: Layout) -> str | None:
    """Why an adapter is not worked out here, by what it would take (``lowrank.decompose`` says how much that is)."""
    sizes = [(target.rank, _sides(target.shape)) for target in layout.targets.values() if target.groups == 1]
    values = sum(rank for rank, _ in sizes)
    work = sum(sides * rank**2 + rank**3 for rank, sides in sizes)
    if values > MAX_VALUES or work > MAX_WORK or any(rank * sides > MAX_TARGET for rank, sides in sizes):
        return "it is too large to be worked out here: loraforge show --spectrum does it on your machine"
    return None if sizes else "it has no update that is one product of two matrices"


def _sides(shape: tuple[int, ...]) -> int:
    """The rows and columns of an update as a matrix, together."""
    return shape[0] + math.prod(shape[1:])
