"""A recipe: adapters from adapters, step by step, from inputs that a lock pins.

A step that was done before, here, from the same artifacts, is found again, not repeated: so an unchanged recipe costs
nothing, and one that was killed goes on where it stopped.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from loraforge.adapter import Adapter
from loraforge.compose import Reranked, RerankReport
from loraforge.errors import ConflictError, FormatError, NotFoundError, RecipeError
from loraforge.recipe._inputs import Around, Opened, open_inputs
from loraforge.recipe._lock import Pin, lock_path, read_lock, write_lock
from loraforge.recipe._nodes import MAX_BYTES, read_nodes
from loraforge.recipe._schema import Document, Step, read_document
from loraforge.recipe._steps import adapter_of, evaluate, layers_in, rehearse, work_of
from loraforge.registry import Registry
from loraforge_registry.digest import Digest
from loraforge_registry.ingest import read_small
from loraforge_registry.names import RefName
from loraforge_registry.paths import AnyPath, expand


@dataclass(frozen=True)
class StepDone:
    """One step of a run: what it came to, and whether that was found rather than made."""

    name: str
    operation: str
    digest: Digest | None
    found: bool


@dataclass(frozen=True)
class Made:
    """What a run came to: ``digest`` is None, and nothing is stored, in a preview.

    ``report`` is that of the last step, where it re-ranked and was not found again; ``notes`` are worth a look: refs
    that have moved, what the result does not use.
    """

    adapter: Adapter
    digest: Digest | None
    steps: tuple[StepDone, ...]
    pins: Mapping[str, Pin]
    notes: tuple[str, ...]
    report: RerankReport | None = None


@dataclass(frozen=True)
class Recipe:
    """A recipe file, read and checked; ``Recipe.load`` makes one."""

    path: Path
    document: Document
    root: Path

    @classmethod
    def load(cls, path: AnyPath, *, root: AnyPath | None = None) -> "Recipe":
        """Read a recipe. The paths of its inputs stay below ``root``; without one, below its own directory.

        Raises:
            NotFoundError: no such file, or root.
            RecipeError: with file, line and column: not plain YAML, or against the schema.
        """
        file = expand(path)
        if file.suffix == ".lock":
            raise RecipeError(f"{path}: is named as a lock; name the recipe that it belongs to")
        try:
            data = read_small(file, MAX_BYTES)
        except FormatError as error:
            raise RecipeError(f"{path}:1:1: {str(error).removeprefix(f'{file}: ')}") from error
        below = file.parent if root is None else expand(root)
        if not below.is_dir():
            raise NotFoundError(f"{root}: no such directory, so no input of {path} can be in it")
        return cls(file, read_document(read_nodes(data, str(path))), below)

    def lock(self, registry: Registry | None = None, *, update: bool = False) -> Mapping[str, Pin]:
        """Pin every input in the lock beside the recipe, and return the pins; with ``update`` as they are now.

        Raises:
            RecipeError, NotFoundError, FormatError, StoreError: as ``run``.
        """
        pins = {name: opened.pin for name, opened in self._open(registry or Registry(), update=update).items()}
        write_lock(lock_path(self.path), pins)
        return pins

    def preview(self, registry: Registry | None = None, *, update: bool = False) -> Made:
        """Make the result in memory; nothing is stored, nor locked."""
        return self._follow(registry or Registry(), update=update, keep=False)

    def run(
        self, registry: Registry | None = None, *, name: str | None = None, update: bool = False, force: bool = False
    ) -> Made:
        """Make the result, step by step into the store, name it, and write the lock.

        Args:
            registry: the store; without it the default one.
            name: what to call the result.
            update: take inputs as they are now, whatever the lock says.
            force: move a tag that means another adapter.

        Raises:
            RecipeError: an input is not what the lock says, or a step cannot work; nothing is written.
            NotFoundError, FormatError, StoreError: an input is not there, or damaged; nothing is written.
            ConflictError: the tag means another adapter; all steps are stored.
        """
        registry = registry or Registry()
        ref = None if name is None else RefName.parse(name)
        made = self._follow(registry, update=update, keep=True, ref=ref, force=force)
        write_lock(lock_path(self.path), made.pins)
        return made

    def _open(self, registry: Registry, *, update: bool) -> dict[str, Opened]:
        lock = lock_path(self.path)
        if lock.absolute().parent.resolve().is_relative_to(registry.store.path.resolve()):
            raise RecipeError(
                f"{self.path}:1:1: is in the store {registry.store.path}, where only the store writes; move it"
            )
        pins = {} if update else read_lock(lock)
        return open_inputs(self.document.inputs, Around(self.path.parent, self.root, lock), registry, pins)

    def _follow(
        self, registry: Registry, *, update: bool, keep: bool, ref: RefName | None = None, force: bool = False
    ) -> Made:
        opened = self._open(registry, update=update)
        adapters = {name: one.adapter for name, one in opened.items()}
        layers = layers_in(self.document, adapters)
        rehearse(self.document, adapters, layers)
        done: list[StepDone] = []
        made: Adapter | Reranked = next(iter(adapters.values()))
        with registry.store.session() if keep else nullcontext():
            digests = _keep_inputs(registry, opened) if keep else {}
            adapters |= {name: registry.load(str(digest), verify=False) for name, digest in digests.items()}
            for step in self.document.order:
                made, told = _do(registry, step, adapters, digests, layers) if keep else _try(step, adapters, layers)
                adapters[step.name] = adapter_of(made)
                done.append(told)
            last = done[-1]
            if ref is not None and last.digest is not None:
                registry.store.tag(last.digest, ref, force=force, what=last.operation)
        return Made(
            adapter=adapter_of(made),
            digest=last.digest,
            steps=tuple(done),
            pins={name: one.pin for name, one in opened.items()},
            notes=_notes(self.document, opened),
            report=made.report if isinstance(made, Reranked) else None,
        )


def _try(step: Step, adapters: Mapping[str, Adapter], layers: int) -> tuple[Adapter | Reranked, StepDone]:
    return evaluate(step, adapters, layers), StepDone(step.name, step.operation, None, found=False)


def _do(
    registry: Registry, step: Step, adapters: Mapping[str, Adapter], digests: dict[str, Digest], layers: int
) -> tuple[Adapter | Reranked, StepDone]:
    """Find a step's result, or make and store it."""
    work = work_of(step, digests, layers)
    found = registry.store.recall(work)
    made: Adapter | Reranked
    if found is not None:
        digest, made = found, registry.load(str(found))
    else:
        result = evaluate(step, adapters, layers)
        digest = registry.push(result)
        registry.store.remember(work, digest)
        stored = registry.load(str(digest), verify=False)  # mapped: what was computed need not stay in memory
        made = Reranked(stored, result.report) if isinstance(result, Reranked) else stored
    digests[step.name] = digest
    return made, StepDone(step.name, step.operation, digest, found=found is not None)


def _keep_inputs(registry: Registry, opened: Mapping[str, Opened]) -> dict[str, Digest]:
    """Store the inputs that are directories, and keep all of them from collection while the session lasts."""
    digests = {}
    with registry.store.session() as session:
        for name, one in opened.items():
            if one.path is not None and registry.push(one.path) != one.pin.digest:
                raise ConflictError(f"{one.path} changed while it was read; try again when nobody writes to it")
            session.pin(one.pin.digest)
            registry.store.manifest(one.pin.digest)
            digests[name] = one.pin.digest
    return digests


def _notes(document: Document, opened: Mapping[str, Opened]) -> tuple[str, ...]:
    notes = [one.note for one in opened.values() if one.note is not None]
    unused = document.unused
    return (*notes, *([f"not used by the result: {', '.join(unused[:8])}"] if unused else []))
