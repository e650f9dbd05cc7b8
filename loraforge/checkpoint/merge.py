"""Merge adapters into a checkpoint, take them out bit for bit, and prove that a merged one is what it says."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from loraforge.checkpoint import inplace
from loraforge.checkpoint.changes import Change
from loraforge.checkpoint.engine import Job, run_jobs
from loraforge.checkpoint.plan import Ingredient, plan_changes
from loraforge.checkpoint.reader import Checkpoint, open_checkpoint
from loraforge.checkpoint.receipt import Receipt, Record, Used
from loraforge.checkpoint.result import MergeResult, check_tensors, prove, results_of, untouched_record
from loraforge.checkpoint.sources import (
    Source,
    check_outside,
    check_unchanged,
    find_adapters,
    ingredients_of,
    plan_undo,
    receipt_of,
)
from loraforge.checkpoint.staging import left_out, staging
from loraforge.errors import NotFoundError
from loraforge.registry import Registry
from loraforge_registry import canonical
from loraforge_registry.digest import Digest
from loraforge_registry.paths import AnyPath, expand

if TYPE_CHECKING:
    from loraforge.checkpoint.fidelity import Fidelity

Progress: TypeAlias = Callable[[int], object]
"""Called with the number of bytes that have just been done."""

_KEY = "loraforge.merge/5"  # another number where equal inputs would give other bytes


def merge(
    base: AnyPath,
    adapters: "Source | Sequence[Source | tuple[Source, float]]",
    out: AnyPath,
    *,
    compute: str = "exact",
    receipt: bool = True,
    registry: Registry | None = None,
    progress: Progress | None = None,
) -> MergeResult:
    r"""Write ``base`` with adapters merged in, as a new checkpoint directory that appears complete or not at all.

    Equation: ``W' = round(W + sum_i w_i scale_i B_i A_i)``, the real number rounded once into W's type, however many
    adapters there are (see ``exact``); with ``compute="float32"`` as PEFT's ``merge_adapter`` does it, one after the
    other in float32 (float64 for a float64 base). DoRA, saved modules, biases and token rows as PEFT merges them.

    The output keeps the base's files, shards and headers; beside the weights lies ``loraforge.receipt``, with which
    ``unmerge`` restores every bit of the base. Killed, the same call goes on where it was.

    Cost: reads the base once, writes it once; memory of a few blocks a thread, whatever the model's size.

    Args:
        base: a checkpoint directory, or one ``.safetensors`` file.
        adapters: one or several, each with a weight or without (1).
        out: the directory to make.
        compute: ``"exact"`` or ``"float32"``.
        receipt: digests and undo records; without them the merge is faster and cannot be taken back.
        registry: where references are looked up.
        progress: called with bytes done.

    Raises:
        CompositionError: a target that finds no tensor, shapes that differ, what cannot be merged.
        NumericalError: NaN or infinity, in the base, an adapter or the result.
        ConflictError: ``out`` exists or lies in the base or an adapter; or the base changed meanwhile.
        InputOutputError: it cannot be read or written.
    """
    check_outside(expand(out), adapters)
    used, ingredients = ingredients_of(adapters, registry)
    inplace.finish(expand(base), [ingredient.adapter for ingredient in ingredients], registry)
    with open_checkpoint(base) as checkpoint:
        changes = plan_changes(checkpoint, ingredients, compute=compute)
        jobs = [Job(checkpoint.tensors[name], change) for name, change in changes.items()]
        key = _key(checkpoint, used, compute, receipt=receipt)
        return _write(checkpoint, jobs, expand(out), key, _Recipe(used, compute, receipt, ingredients), progress)


@dataclass(frozen=True, slots=True)
class _Recipe:
    """What a receipt will say beside its tensors."""

    used: tuple[Used, ...]
    compute: str
    receipt: bool
    ingredients: Sequence[Ingredient]


def unmerge(
    merged: AnyPath,
    out: AnyPath,
    *,
    only: str | Sequence[str] = (),
    adapters: Sequence[Source] = (),
    registry: Registry | None = None,
    receipt: AnyPath | None = None,
    progress: Progress | None = None,
) -> MergeResult:
    r"""Write what a merged checkpoint was before: every tensor has the digest that the receipt says the base's had.

    Equation: ``W = RN(W' - dW)`` plus the receipt's corrections, whole units in the last place. With ``only``, the
    named adapters are taken out and the others stay: ``round(W + the rest)``, in one pass, with a new receipt.

    Cost: as ``merge``.

    Args:
        merged: a directory with a receipt in it.
        out: the directory to make.
        only: which adapters to take out: names as the receipt has them, or digests; all where it is empty.
        adapters: the adapters, where they are not in the registry.
        registry: where they are looked up by what they compute.
        receipt: the receipt, where another program has written the tensors to another directory without it.
        progress: called with bytes done.

    Raises:
        NotFoundError: no receipt, or an adapter that is nowhere to be found.
        ConflictError: a tensor is not the one that the merge left; nothing is written.
    """
    check_outside(expand(out), adapters)
    inplace.finish(expand(merged), adapters, registry)
    with open_checkpoint(merged) as checkpoint:
        file = receipt_of(checkpoint, receipt)
        check_tensors(checkpoint, file.receipt)
        undo = plan_undo(checkpoint, file, find_adapters(file.receipt, adapters, registry))
        rest = _staying(file.receipt, [only] if isinstance(only, str) else only)
        kept = find_adapters(replace(file.receipt, used=tuple(rest)), adapters, registry) if rest else []
        changes = plan_changes(checkpoint, kept, compute=file.receipt.compute, undoing=True) if kept else {}
        jobs = [Job(checkpoint.tensors[name], changes.get(name), undo[name]) for name in undo]
        recipe = _Recipe(tuple(rest), file.receipt.compute, receipt=bool(rest), ingredients=kept)
        key = _key(checkpoint, file.receipt.used, file.receipt.compute, receipt=True, rest=rest)
        return _write(checkpoint, jobs, expand(out), key, recipe, progress, file.receipt)


def _staying(receipt: Receipt, only: Sequence[str]) -> list[Used]:
    """Return the adapters that stay where ``only`` names those that go; none where it names none."""
    rest = list(receipt.used) if only else []
    for name in only:
        fits = [used for used in rest if name in _names(used)]
        if len(set(fits)) != 1:  # of one that went in twice, either goes
            there = ", ".join(used.label for used in receipt.used)
            raise NotFoundError(f"{len(fits)} adapters of this merge are called {name!r}; it has {there}")
        rest.remove(fits[0])
    return rest


def _names(used: Used) -> set[str]:
    digests = [str(used.content_id)] + ([str(used.digest)] if used.digest else [])
    return {used.label, used.label.removesuffix(":latest"), *digests}


def _write(
    checkpoint: Checkpoint,
    jobs: Sequence[Job],
    out: Path,
    key: Digest,
    recipe: _Recipe,
    progress: Progress | None,
    proof: Receipt | None = None,
) -> MergeResult:
    """Do jobs into a new directory, and publish it; ``proof`` is what an unmerge must agree with."""
    kinds = {job.tensor.entry.name: "" if job.change is None else job.change.kind for job in jobs}
    hashed = recipe.receipt or proof is not None
    fidelity: dict[str, Fidelity] = {}
    with staging(checkpoint, out, key) as stage:
        ready = stage.take_up(kinds) if hashed else set()
        todo = [job for job in jobs if job.tensor.entry.name not in ready]
        todo += [Job(tensor) for name, tensor in checkpoint.tensors.items() if name not in kinds]
        rest: dict[str, Record] = {}
        stage.copy_headers()
        for done in run_jobs(checkpoint, todo, stage.write, copy=stage.copy, hashed=hashed):
            name = done.tensor.entry.name
            if proof is not None:
                prove(proof.records[name], done)
            if name in kinds:
                stage.finished(done, kinds[name])
                fidelity[name] = done.fidelity
            elif hashed:
                rest[name] = untouched_record(done)
            if progress is not None:
                progress(done.tensor.nbytes)
        checkpoint.check_unchanged()
        check_unchanged(recipe.used, recipe.ingredients)
        fidelity |= {name: record.fidelity for name, record in stage.records().items()}
        receipt = Receipt(recipe.used, recipe.compute, rest | stage.records()) if hashed else None
        size = stage.publish(receipt if recipe.receipt else None)
    kinds = kinds if proof is None else {name: proof.records[name].kind for name in kinds}
    found = MergeResult(
        out=out,
        tensors=results_of(checkpoint, kinds, fidelity),
        untouched=len(checkpoint.tensors) - len(kinds),
        nbytes=checkpoint.nbytes,
        receipt_size=size,
        left_out=left_out(checkpoint),
    )
    return found if receipt is None else replace(found, base=receipt.base, merged=receipt.merged)


def preview_merge(
    base: AnyPath,
    adapters: "Source | Sequence[Source | tuple[Source, float]]",
    *,
    compute: str = "exact",
    registry: Registry | None = None,
) -> MergeResult:
    """Return what ``merge`` would do, and write nothing; the fidelity is measured on the same samples.

    Cost: reads some of each tensor that would change.

    Raises:
        LoraforgeError: as ``merge``.
    """
    _, ingredients = ingredients_of(adapters, registry)
    with open_checkpoint(base) as checkpoint:
        return _sample(checkpoint, plan_changes(checkpoint, ingredients, compute=compute))


def _sample(checkpoint: Checkpoint, changes: Mapping[str, Change]) -> MergeResult:
    jobs = [Job(checkpoint.tensors[name], change) for name, change in changes.items()]
    fidelity = {
        done.tensor.entry.name: done.fidelity for done in run_jobs(checkpoint, jobs, None, hashed=False, sampled=True)
    }
    kinds = {name: change.kind for name, change in changes.items()}
    return MergeResult(
        out=None,
        tensors=results_of(checkpoint, kinds, fidelity),
        untouched=len(checkpoint.tensors) - len(changes),
        nbytes=checkpoint.nbytes,
        left_out=left_out(checkpoint),
    )


def _key(
    checkpoint: Checkpoint, used: Sequence[Used], compute: str, *, receipt: bool, rest: Sequence[Used] | None = None
) -> Digest:
    """Return the digest of what is being made, from what: another file, weight or option is another output."""
    adapters: list[canonical.Value] = [[u.label, u.weight, u.content_id.raw] for u in used]
    kept: canonical.Value = None if rest is None else [[u.label, u.weight, u.content_id.raw] for u in rest]
    shards: list[canonical.Value] = [
        [name, Digest.of(shard.header.raw).raw, list(dataclasses.astuple(shard.stamp))]
        for name, shard in sorted(checkpoint.shards.items())
    ]
    return Digest.of(canonical.encode([_KEY, adapters, kept, compute, receipt, shards], max_bytes=None))
