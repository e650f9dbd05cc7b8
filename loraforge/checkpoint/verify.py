"""Is this checkpoint the base and the adapters that its receipt names? Tensor by tensor, by digest."""

from collections.abc import Sequence
from dataclasses import dataclass

from loraforge.checkpoint.engine import Done, Job, run_jobs
from loraforge.checkpoint.plan import Ingredient, plan_changes
from loraforge.checkpoint.reader import Checkpoint, open_checkpoint
from loraforge.checkpoint.receipt import Receipt, Record
from loraforge.checkpoint.sources import Source, find_adapters, plan_undo, receipt_of
from loraforge.errors import NotFoundError
from loraforge.registry import Registry
from loraforge_registry.paths import AnyPath


@dataclass(frozen=True, slots=True)
class Difference:
    """A tensor that is not what the receipt says, and how."""

    tensor: str
    why: str


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What a check found, and how far it went.

    ``depth`` is ``receipt`` where only the digests that the merge left were compared, since an adapter was not to be
    found; ``adapters`` where taking the adapters out was seen to give the base's digests; ``base`` where merging them
    into the given base was seen to give this checkpoint.
    """

    depth: str
    tensors: int
    differences: tuple[Difference, ...]
    receipt: Receipt

    @property
    def holds(self) -> bool:
        """Whether every tensor is what it should be."""
        return not self.differences


def verify_merge(
    merged: AnyPath,
    *,
    base: AnyPath | None = None,
    adapters: Sequence[Source] = (),
    registry: Registry | None = None,
    receipt: AnyPath | None = None,
) -> VerifyReport:
    """Check a merged checkpoint against its receipt, its adapters and, where it is given, its base.

    Cost: reads every tensor once, and those of ``base`` once more.

    Raises:
        NotFoundError: no receipt; or ``base`` is given and an adapter is nowhere to be found.
        FormatError: the receipt is damaged.
    """
    with open_checkpoint(merged) as checkpoint:
        file = receipt_of(checkpoint, receipt)
        said = file.receipt
        differences = _shapes(checkpoint, said)
        if differences:
            return VerifyReport("receipt", len(checkpoint.tensors), tuple(differences), said)
        try:
            depth, ingredients = "adapters", find_adapters(said, adapters, registry)
        except NotFoundError:
            if base is not None:
                raise
            depth, ingredients = "receipt", []
        undo = plan_undo(checkpoint, file, ingredients) if ingredients else {}
        jobs = [Job(tensor, None, undo.get(name)) for name, tensor in checkpoint.tensors.items()]
        for done in run_jobs(checkpoint, jobs, None):
            differences += _compare(said.records[done.tensor.entry.name], done, undone=done.tensor.entry.name in undo)
    if base is not None:
        depth = "base"
        differences += _from_base(base, said, ingredients)
    ordered = sorted(set(differences), key=lambda found: found.tensor)
    return VerifyReport(depth, len(said.records), tuple(ordered), said)


def _shapes(checkpoint: Checkpoint, said: Receipt) -> list[Difference]:
    """Return tensors that are missing, surplus, or of another type or shape."""
    found = []
    for name in sorted(set(checkpoint.tensors) | set(said.records)):
        here, there = checkpoint.tensors.get(name), said.records.get(name)
        if here is None or there is None:
            found.append(Difference(name, "is missing" if here is None else "is not of this merge"))
        elif (here.entry.dtype, here.entry.shape) != (there.entry.dtype, there.entry.shape):
            what = f"{here.entry.dtype} {list(here.entry.shape)}"
            found.append(Difference(name, f"is {what}, expected {there.entry.dtype} {list(there.entry.shape)}"))
    return found


def _compare(record: Record, done: Done, *, undone: bool) -> list[Difference]:
    if done.read != record.after:
        return [Difference(record.entry.name, "is not what the merge left: something has changed it since")]
    if undone and done.original != record.before:
        return [Difference(record.entry.name, "does not give the base's digest when its adapters are taken out")]
    return []


def _from_base(base: AnyPath, said: Receipt, ingredients: Sequence[Ingredient]) -> list[Difference]:
    """Merge again, and compare; nothing is written."""
    with open_checkpoint(base) as checkpoint:
        differences = _shapes(checkpoint, said)
        if differences:
            return [Difference(d.tensor, f"{d.why} in the base") for d in differences]
        changes = plan_changes(checkpoint, ingredients, compute=said.compute)
        jobs = [Job(tensor, changes.get(name)) for name, tensor in checkpoint.tensors.items()]
        for done in run_jobs(checkpoint, jobs, None):
            record = said.records[done.tensor.entry.name]
            if done.original != record.before:
                differences.append(Difference(record.entry.name, "is another one in this base"))
            elif done.result != record.after:
                differences.append(Difference(record.entry.name, "is not what base and adapters give"))
    return differences
