"""What was used last, up to a weight: for what never changes and is slow to read."""

from collections import OrderedDict
from collections.abc import Callable
from threading import Lock
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Recent(Generic[K, V]):
    """A cache for several threads. What is heavier than all of it together is not kept."""

    def __init__(self, limit: int) -> None:
        self._limit, self._held = limit, 0
        self._items: OrderedDict[K, tuple[V, int]] = OrderedDict()
        self._lock, self._loading = Lock(), Lock()

    def get(self, key: K) -> V | None:
        """What was put there, if it still is."""
        with self._lock:
            found = self._items.get(key)
            if found is None:
                return None
            self._items.move_to_end(key)
            return found[0]

    def get_or(self, key: K, load: Callable[[], V], weigh: Callable[[V], int] = lambda _: 1) -> V:
        """What is there, else what ``load`` gives, which is kept.

        A server that begins is asked by all at once: one thread loads, and what others ask for is there for them then.
        """
        found = self.get(key)
        if found is None:
            with self._loading:
                found = self.get(key)
                if found is None:
                    found = load()
                    self.put(key, found, weigh(found))
        return found

    def put(self, key: K, value: V, weight: int) -> None:
        """Keep a value; what was not asked for longest goes."""
        if weight > self._limit:
            return
        with self._lock:
            _, before = self._items.pop(key, (None, 0))
            self._items[key] = (value, weight)
            self._held += weight - before
            while self._held > self._limit:
                self._held -= self._items.popitem(last=False)[1][1]
