"""Opened adapters of a store: kept while there is room, and fetched ahead while nobody waits for them.

What is fetched ahead changes no result: it is opened as everything is, every byte checked; it never takes the room of
what somebody asked for; and what goes wrong with it is said to whoever asks for it.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

from loraforge.adapter import Adapter, named_tensors
from loraforge.registry import Registry
from loraforge_registry.digest import Digest

BUDGET = 2 << 30  # bytes
_COPIES = 4  # of a node's numbers, in float32: as they are in its file, and both float64 and float32 for checkouts


class Cache:
    """Adapters by digest; the one that was asked for longest ago goes when they take more than ``budget`` bytes.

    What a checkout computes of an adapter's factors goes with it, and is counted.
    """

    def __init__(self, registry: Registry, budget: int = BUDGET) -> None:
        self._registry = registry
        self.budget = budget
        self._held: OrderedDict[Digest, tuple[Adapter, int]] = OrderedDict()
        self._lock = threading.Lock()
        self._ahead: dict[Digest, Future[None]] = {}
        self._worker: ThreadPoolExecutor | None = None

    def open(self, digest: Digest) -> Adapter:
        """Return a node's adapter; every byte of it is checked when it is read from the store."""
        coming = self._ahead.pop(digest, None)
        if coming is not None and not coming.cancel():
            coming.exception()  # it is being opened already: wait, whatever it comes to
        with self._lock:
            known = self._held.get(digest)
        adapter, size = known or self._load(digest)
        with self._lock:
            self._held[digest] = adapter, size
            self._held.move_to_end(digest)
            while self._total() > self.budget and len(self._held) > 1:
                self._held.popitem(last=False)
        return adapter

    def prefetch(self, digests: Iterable[Digest]) -> None:
        """Open adapters in a thread of their own, instead of what was asked for before, as far as there is room."""
        self._forget_pending()
        wanted = [digest for digest in digests if digest not in self]
        if wanted and self._worker is None:
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="loraforge-prefetch")
        for digest in wanted:
            assert self._worker is not None  # noqa: S101 - made above
            self._ahead[digest] = self._worker.submit(self._fetch, digest)

    def stop(self) -> None:
        """Fetch no more ahead; what is being opened is waited for, and no thread is left."""
        self._forget_pending()
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.shutdown(wait=True, cancel_futures=True)

    def settle(self) -> None:
        """Wait until all that was asked for ahead is there, or could not be."""
        for coming in list(self._ahead.values()):
            coming.exception()

    def clear(self) -> None:
        """Let go of all of them."""
        self.stop()
        with self._lock:
            self._held.clear()

    def __contains__(self, digest: Digest) -> bool:
        with self._lock:
            return digest in self._held

    @property
    def nbytes(self) -> int:
        """The bytes that all of them may take."""
        with self._lock:
            return self._total()

    def _total(self) -> int:
        return sum(size for _, size in self._held.values())

    def _load(self, digest: Digest) -> tuple[Adapter, int]:
        adapter = self._registry.load(str(digest))
        return adapter, _COPIES * sum(tensor.numel() * 4 for tensor in named_tensors(adapter).values())

    def _fetch(self, digest: Digest) -> None:
        """Open one ahead, if there is room; it is the first to go."""
        with suppress(Exception):  # whoever asks for it opens it again, and is told
            if self.nbytes + self._registry.store.manifest(digest).size > self.budget:
                return
            found = self._load(digest)
            with self._lock:
                if digest not in self._held and self._total() + found[1] <= self.budget:
                    self._held[digest] = found
                    self._held.move_to_end(digest, last=False)

    def _forget_pending(self) -> None:
        for coming in self._ahead.values():
            coming.cancel()
        self._ahead = {digest: coming for digest, coming in self._ahead.items() if coming.running()}
