"""What comes before a commit: found by its id, or listed, without reading again a history that was read once.

A commit has one parent at most, and its record's digest fixes all that comes before it, so nothing here goes stale. A
history is a chain of commits, oldest first; one that begins in the midst of another is a chain of its own, whose stem
is that place. Whether a commit comes before another is then a climb from stem to stem, however long the histories are.
"""

from collections.abc import Callable, Iterable, Iterator
from threading import Lock

from loraforge_registry.digest import Digest
from loraforge_registry.errors import LoraforgeError
from loraforge_registry.repositories import Outline

Commit = tuple[Digest, Outline]
Past = Callable[[Digest], Iterator[Commit]]
_Place = tuple[int, int]  # which chain, and how far along it


class Pasts:
    """A cache for several threads, begun again when it has more than ``limit`` commits, and twice any history in it.

    What is not here is read by the ``past`` of a call: a commit and those before it, newest first.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._longest, self._lock = limit, 0, Lock()
        self._chains: list[list[Commit]] = []
        self._stems: list[_Place | None] = []
        self._places: dict[Digest, _Place] = {}
        self._by_id: dict[str, list[Digest]] = {}

    def find(self, past: Past, heads: Iterable[Digest], identity: str) -> Digest | None:
        """Return the record of the commit with this id that is a head or comes before one.

        Cost: a look into the chain of the first head, where it is there.

        Raises:
            LoraforgeError, OSError: it is not among what could be read, and not all could.
        """
        problem, passed = None, dict[int, int]()
        with self._lock:
            self._begin()
            for head in heads:
                try:
                    for number, begin, end in self._climb(past, head, passed):
                        for digest in self._by_id.get(identity, ()):
                            chain, along = self._places[digest]
                            if chain == number and begin <= along <= end:
                                return digest
                except (LoraforgeError, OSError) as error:
                    problem = error
        if problem is not None:
            raise problem
        return None

    def walk(self, past: Past, heads: Iterable[Digest]) -> tuple[list[Commit], Exception | None]:
        """Return commits and all before them, each once, newest first; and what kept the rest from being read."""
        problem, passed = None, dict[int, int]()
        found: list[Commit] = []
        with self._lock:
            self._begin()
            for head in heads:
                try:
                    for number, begin, end in self._climb(past, head, passed):
                        found += reversed(self._chains[number][begin : end + 1])
                except (LoraforgeError, OSError) as error:
                    problem = error
        return found, problem

    def _begin(self) -> None:
        if len(self._places) > max(self._limit, 2 * self._longest):
            self._longest = 0
            for kept in (self._chains, self._stems, self._places, self._by_id):
                kept.clear()

    def _climb(self, past: Past, head: Digest, passed: dict[int, int]) -> Iterator[tuple[int, int, int]]:
        """Yield the parts of chains that come before a head, but for what was passed already."""
        place: _Place | None = self._place(past, head)
        while place is not None:
            number, end = place
            begin = passed.get(number, -1) + 1
            if begin > end:
                return
            passed[number] = end
            yield number, begin, end
            place = self._stem(past, number)

    def _stem(self, past: Past, number: int) -> _Place | None:
        """Where a chain begins; where reading broke off, it is tried again."""
        stem, parent = self._stems[number], self._chains[number][0][1].parent
        if stem is None and parent is not None:
            stem = self._stems[number] = self._place(past, parent)
        return stem

    def _place(self, past: Past, head: Digest) -> _Place:
        """Where a commit is; read back from it to what is known."""
        if head not in self._places:
            read: list[Commit] = []
            try:
                for digest, outline in past(head):
                    read.append((digest, outline))
                    if outline.parent in self._places:
                        break
            except (LoraforgeError, OSError):
                if not read:
                    raise
            self._add(read)
        return self._places[head]

    def _add(self, read: list[Commit]) -> None:
        self._longest = max(self._longest, len(read))
        parent = read[-1][1].parent
        stem = None if parent is None else self._places.get(parent)
        if stem is not None and stem[1] == len(self._chains[stem[0]]) - 1:
            number = stem[0]  # it goes on
        else:
            number = len(self._chains)
            self._chains.append([])
            self._stems.append(stem)
        chain = self._chains[number]
        for digest, outline in reversed(read):
            self._places[digest] = number, len(chain)
            self._by_id.setdefault(outline.id, []).append(digest)
            chain.append((digest, outline))
