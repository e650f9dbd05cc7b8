"""One flipped bit in any file of a store: a deep check names the file, and nothing that reads gives a wrong answer.

The check and the reads are the real ones, in this process. A bit is flipped in place and flipped back, so the listings
of directories are kept: the names in a store stay what they are meanwhile.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import astuple, dataclass, field

from loraforge_registry import index
from loraforge_registry.digest import Digest
from loraforge_registry.errors import LoraforgeError
from loraforge_registry.files import Files
from loraforge_registry.names import RefName
from loraforge_registry.refs import file_name
from loraforge_registry.store import Store
from tests.crash.store_world import World, quick_disk

Place = tuple[str, int]  # a file of the store, a bit of it
NAMES = ("a:v1", "a:latest", "child:latest")
WEIGHTS_FROM = 200  # bytes: the configs of a world are smaller, its weights larger


class StillFiles(Files):
    """Files whose names do not change: each directory is listed once."""

    def __init__(self, root) -> None:
        super().__init__(root)
        self._listings: dict[str, list[str]] = {}

    def names(self, directory: str) -> list[str]:
        if directory in ("sessions", "tmp"):  # reading pins
            return super().names(directory)
        if directory not in self._listings:
            self._listings[directory] = super().names(directory)
        return list(self._listings[directory])


@dataclass
class Flips:
    """What flipping has shown."""

    metadata: int = 0
    weights: int = 0
    right: int = 0
    refused: int = 0
    wrong: list[str] = field(default_factory=list)

    def __add__(self, other: "Flips") -> "Flips":
        return Flips(*(mine + theirs for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True)))


def places(world: World) -> tuple[list[Place], list[Place]]:
    """Return every bit of FORMAT, refs, reflogs, manifests and configs, and every bit of weights."""
    metadata: list[Place] = []
    weights: list[Place] = []
    for path, (data, _) in sorted(world.start.items()):
        if path.startswith(("FORMAT", "blobs/", "manifests/", "refs/", "reflog/")):
            is_weights = path.startswith("blobs/") and len(data) > WEIGHTS_FROM
            (weights if is_weights else metadata).extend((path, bit) for bit in range(len(data) * 8))
    return metadata, weights


def flip_all(world: World, metadata: Iterable[Place], weights: Iterable[Place]) -> Flips:
    """Flip one bit after another, and ask."""
    index.read_summaries = lambda _root: {}  # the cache answers without looking: a row's digest never goes stale
    index.write_summaries = lambda _root, _rows: None
    found = Flips()
    with quick_disk():
        store = Store(world.store)
        store._files = StillFiles(world.store)
        expected = dict(_answers(world, store))
        assert not any(isinstance(answer, Exception) for answer in expected.values()), expected
        for kind, chosen in (("metadata", metadata), ("weights", weights)):
            for place in chosen:
                _flip(world, store, place, expected, found)
                setattr(found, kind, getattr(found, kind) + 1)
        assert dict(_answers(world, store)) == expected  # every bit is back
    return found


def _flip(world: World, store: Store, place: Place, expected: dict[str, object], found: Flips) -> None:
    path, bit = place
    data = world.start[path][0]
    fd = os.open(world.store / path, os.O_RDWR)
    try:
        os.pwrite(fd, bytes([data[bit // 8] ^ 1 << bit % 8]), bit // 8)
        lines = list(_wrong(world, store, path, expected, found))
        os.pwrite(fd, data[bit // 8 : bit // 8 + 1], bit // 8)
    finally:
        os.close(fd)
    found.wrong += [f"{path} bit {bit}: {line}" for line in lines]


def _wrong(world: World, store: Store, path: str, expected: dict[str, object], found: Flips) -> Iterator[str]:
    try:
        Store(world.store)
    except LoraforgeError as error:
        if path != "FORMAT":
            yield f"the store does not open: {error}"
        return
    if not _named(store, path):
        yield "a deep check passes over it"
    for question, answer in _answers(world, store):
        if isinstance(answer, LoraforgeError):
            found.refused += 1
        elif answer == expected[question] or (question == "reflog" and _part_of(answer, expected[question])):
            found.right += 1
        else:
            yield f"{question} gives {answer!r:.200}"


def _named(store: Store, path: str) -> bool:
    """Whether a deep check says where the damage is; a line of a history that is no record is said, but no damage."""
    for problem in store.fsck(deep=True).problems:
        name = f"refs/{file_name(problem.ref)}" if problem.ref else ""
        if path in (problem.place, name) and (problem.is_damage or path.startswith("reflog/")):
            return True
    return False


def _part_of(some: object, all_of_it: object) -> bool:
    """Whether a history is the right one but for records that are gone."""
    assert isinstance(some, list)
    assert isinstance(all_of_it, list)
    rest = iter(all_of_it)
    return all(move in rest for move in some)


def _answers(world: World, store: Store) -> Iterator[tuple[str, object]]:
    """Ask what every reading command asks its library."""
    for question, ask in _QUESTIONS.items():
        for name in NAMES if question in _OF_A_NAME else [""]:
            try:
                yield f"{question} {name}".rstrip(), ask(world, store, name)
            except Exception as error:  # noqa: BLE001 - one that is not the project's own is a wrong answer, too
                yield f"{question} {name}".rstrip(), error


def _ls(_world: World, store: Store, _name: str) -> object:
    lines = store.ls()
    for line in lines:
        if line.problem:
            raise LoraforgeError(line.problem)
    return lines


def _show(_world: World, store: Store, name: str) -> object:
    digest = store.resolve(name)
    manifest = store.manifest(digest)
    return digest, astuple(manifest), astuple(store.layout(manifest))


def _log(_world: World, store: Store, name: str) -> object:
    lineage, todo = [], [store.resolve(name)]
    while todo:
        lineage.append(todo.pop())
        derivation = store.manifest(lineage[-1]).derivation
        todo += derivation.artifacts() if derivation else ()
    return lineage


def _pull(world: World, store: Store, name: str) -> object:
    target = world.root / "pulled"
    try:
        store.export(store.resolve(name), target)
        return {path.name: path.read_bytes() for path in target.iterdir()}
    finally:
        shutil.rmtree(target, ignore_errors=True)


def _export(world: World, store: Store, _name: str) -> object:
    target = world.root / "pulled.lf"
    named = {RefName.parse(name): store.resolve(name) for name in NAMES}
    try:
        store.export_bundle(sorted(set(named.values())), named, target)
        return target.read_bytes()
    finally:
        target.unlink(missing_ok=True)


def _load(_world: World, store: Store, name: str) -> object:
    """What compose, diff, rerank and merge begin with."""
    from loraforge.registry import Registry

    registry = Registry(store.path)
    registry.store = store
    adapter = registry.load(name)
    return adapter.origin, {
        target: (pair.a.tolist(), pair.b.tolist(), pair.alpha) for target, pair in adapter.targets.items()
    }


def _find(world: World, store: Store, _name: str) -> object:
    content = Store(world.root / "backup").manifest(world.digests[2]).content_id
    found = store.find_content(content)
    return found and (found, Digest.parse(str(found)))


_QUESTIONS: dict[str, Callable[[World, Store, str], object]] = {
    "ls": _ls,
    "show": _show,
    "log": _log,
    "reflog": lambda _world, store, _name: store.reflog("a"),
    "du": lambda _world, store, _name: store.usage(),
    "find": _find,
    "pull": _pull,
    "export": _export,
    "load": _load,
}
_OF_A_NAME = ("show", "log", "pull", "load")
