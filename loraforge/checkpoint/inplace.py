"""Rewrite a checkpoint where it lies: only the bytes that change, and never a mixture under a name a loader takes.

1. Compute everything once, and write nothing but the receipt (as ``loraforge.receipt.new``) and the journal: the sums
   of every page that will change, before and after.
2. Put the shards that will change aside (``<shard>.merging``): from here on no loader finds a model.
3. Go over the pages: write those that are still old, leave those that are new.
4. Prove every tensor by its digest, give the receipt and the shards their names, remove the journal.

Steps 2 to 4 are all that is needed after a crash, at whatever moment it came, so they are what always runs
(``finish``): every page is the old one or the new one, and each change is elementwise, so that a page can be made from
itself alone.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from loraforge.checkpoint import journal, output
from loraforge.checkpoint.engine import Job, run_jobs
from loraforge.checkpoint.floats import Array
from loraforge.checkpoint.journal import JOURNAL, NEW, InUnits, Sums
from loraforge.checkpoint.plan import Ingredient, plan_changes
from loraforge.checkpoint.reader import Checkpoint, open_checkpoint
from loraforge.checkpoint.receipt import NAME as RECEIPT
from loraforge.checkpoint.receipt import (
    Receipt,
    ReceiptFile,
    Record,
    Used,
    in_order,
    merged_already,
    record_of_done,
    write_receipt,
)
from loraforge.checkpoint.result import MergeResult, check_tensors, prove, result_of, untouched_records
from loraforge.checkpoint.sources import Source, check_unchanged, find_adapters, ingredients_of, plan_undo, receipt_of
from loraforge.errors import ConflictError, NotFoundError
from loraforge.registry import Registry
from loraforge_registry.paths import AnyPath, expand

_UNDO = "loraforge.undo.new"


def merge_in_place(
    base: AnyPath,
    adapters: "Source | Sequence[Source | tuple[Source, float]]",
    *,
    compute: str = "exact",
    registry: Registry | None = None,
) -> MergeResult:
    """Merge as ``merge`` does, into the files of ``base`` itself; ``unmerge_in_place`` takes it back.

    Cost: computes everything twice (once to learn what to write down first); writes the touched bytes, and about
    one in fifty more for receipt and journal.

    Raises:
        ConflictError: a file is a link or has other hard links, adapters are merged in already, or another process
            is at work here.
        LoraforgeError: as ``merge``. Nothing is changed, or the next ``merge_in_place`` or ``unmerge_in_place`` of
            this directory finishes it.
    """
    directory = expand(base)
    used, ingredients = ingredients_of(adapters, registry)
    known = [ingredient.adapter for ingredient in ingredients]
    with _alone(directory):
        finished = _finish(directory, known, registry)
        if finished is None or finished[0] != "merge" or not _same(finished[1], used, compute):
            _check_clean(directory)
            with open_checkpoint(directory) as checkpoint:
                changes = plan_changes(checkpoint, ingredients, compute=compute)
                jobs = [Job(checkpoint.tensors[name], change) for name, change in changes.items()]
                _prepare_merge(checkpoint, jobs, used, compute, ingredients)
            finished = _finish(directory, known, registry)
        assert finished is not None, "a journal was there"  # noqa: S101 - written just now, or checked above
        with open_checkpoint(directory) as checkpoint:
            return result_of(checkpoint, finished[1], directory)


def unmerge_in_place(
    merged: AnyPath, *, adapters: Sequence[Source] = (), registry: Registry | None = None
) -> MergeResult:
    """Take back a merge in the files of ``merged`` itself: every tensor has the base's digest again.

    Cost: as ``merge_in_place``.

    Raises:
        NotFoundError: no receipt, or an adapter that is nowhere to be found.
        ConflictError: a tensor is not the one that the merge left; nothing is changed.
    """
    directory = expand(merged)
    with _alone(directory):
        finished = _finish(directory, adapters, registry)
        with open_checkpoint(directory) as checkpoint:
            if finished is not None and finished[0] == "unmerge":
                return result_of(checkpoint, finished[1], directory)
            file = receipt_of(checkpoint, None)
            check_tensors(checkpoint, file.receipt)
            undo = plan_undo(checkpoint, file, find_adapters(file.receipt, adapters, registry))
            journal.check_in_place(checkpoint, list(undo))
            sums: dict[str, tuple[Array, Array]] = {}
            after = Sums()
            for done in run_jobs(
                checkpoint, [Job(checkpoint.tensors[n], None, u) for n, u in undo.items()], InUnits(after.take)
            ):
                name = done.tensor.entry.name
                prove(file.receipt.records[name], done)
                sums[name] = (journal.sums_on_disk(checkpoint, done.tensor), after.of(name))
            untouched_records(checkpoint, dict.fromkeys(undo, ""), file.receipt)
            result = result_of(checkpoint, file.receipt, directory)
            checkpoint.check_unchanged()
            journal.begin(checkpoint, "unmerge", sums)
        _finish(directory, adapters, registry)
        return result


def is_interrupted(directory: Path) -> bool:
    """Whether an in-place operation was cut off here."""
    return (directory / JOURNAL).exists()


def finish(directory: Path, adapters: Sequence[Source] = (), registry: Registry | None = None) -> None:
    """Finish an in-place operation that was cut off, if there is one; or undo it, where it had written nothing yet.

    Raises:
        NotFoundError: pages are written, and an adapter is nowhere to be found.
    """
    if is_interrupted(directory):
        with _alone(directory):
            _finish(directory, adapters, registry)


def _prepare_merge(
    checkpoint: Checkpoint,
    jobs: Sequence[Job],
    used: tuple[Used, ...],
    compute: str,
    ingredients: Sequence[Ingredient],
) -> None:
    """Step 1: the receipt and the journal, from one pass that changes nothing."""
    directory = checkpoint.path
    journal.check_in_place(checkpoint, [job.tensor.entry.name for job in jobs])
    for name in (RECEIPT + NEW, _UNDO):
        output.remove(directory / name)
    records: dict[str, Record] = {}
    sums: dict[str, tuple[Array, Array]] = {}
    after, end = Sums(), 0
    kinds = {job.tensor.entry.name: job.change.kind for job in jobs if job.change is not None}
    undo = output.open_new(directory / _UNDO)
    try:
        for done in run_jobs(checkpoint, jobs, InUnits(after.take)):
            name = done.tensor.entry.name
            output.write_at(undo, done.residual, end, directory / _UNDO)
            records[name] = record_of_done(done, kinds[name], end)
            end += len(done.residual)
            sums[name] = (journal.sums_on_disk(checkpoint, done.tensor), after.of(name))
        records |= untouched_records(checkpoint, kinds)
        receipt, payload = in_order(Receipt(used, compute, records), undo)
        write_receipt(directory / (RECEIPT + NEW), receipt, payload)
    finally:
        os.close(undo)
        output.remove(directory / _UNDO)
    checkpoint.check_unchanged()
    check_unchanged(used, ingredients)
    journal.begin(checkpoint, "merge", sums)


def _finish(directory: Path, adapters: Sequence[Source], registry: Registry | None) -> tuple[str, Receipt] | None:
    """Steps 2 to 4, from wherever they were; return what is done now (merge or unmerge), and its receipt."""
    if not is_interrupted(directory):
        return None
    under_way = journal.read_journal(directory)
    path = directory / (RECEIPT + NEW)
    path = path if path.exists() else directory / RECEIPT
    if not path.exists():  # an unmerge of which only the journal was left to remove
        output.remove(directory / JOURNAL)
        return under_way.operation, Receipt((), "exact", {})
    file = ReceiptFile(path)
    merging = under_way.operation == "merge"
    with open_checkpoint(directory, aside=True) as checkpoint:
        new = journal.written(checkpoint, under_way)
        if not all(bool(units.all()) for units in new.values()):
            try:
                ingredients = find_adapters(file.receipt, adapters, registry)
            except NotFoundError:
                if any(bool(units.any()) for units in new.values()):
                    raise
                _give_up(directory, merging=merging)
                return None
            journal.put_aside(checkpoint, new)
            _write_old_pages(checkpoint, file, ingredients, new, merging=merging)
    with open_checkpoint(directory, aside=True) as checkpoint:
        journal.sync_aside(checkpoint, new)
        _prove_all(checkpoint, file.receipt, list(new), merging=merging)
    _put_in_order(directory, merging=merging)
    return under_way.operation, file.receipt


def _write_old_pages(
    checkpoint: Checkpoint,
    file: ReceiptFile,
    ingredients: Sequence[Ingredient],
    new: Mapping[str, Array],
    *,
    merging: bool,
) -> None:
    undo = plan_undo(checkpoint, file, ingredients, compute=file.receipt.compute)
    tensors = checkpoint.tensors
    jobs = [Job(tensors[n], u.change) if merging else Job(tensors[n], None, u) for n, u in undo.items()]
    todo = [job for job in jobs if not bool(new[job.tensor.entry.name].all())]
    with journal.writing_old_units(checkpoint, new) as write:
        for _ in run_jobs(checkpoint, todo, write, hashed=False, checked=False):
            pass


def _give_up(directory: Path, *, merging: bool) -> None:
    """Nothing is written yet: put everything back as it was."""
    journal.put_back(directory)
    if merging:
        output.remove(directory / (RECEIPT + NEW))
    output.remove(directory / JOURNAL)


def _prove_all(checkpoint: Checkpoint, receipt: Receipt, names: Sequence[str], *, merging: bool) -> None:
    for done in run_jobs(checkpoint, [Job(checkpoint.tensors[name]) for name in names], None):
        record = receipt.records[done.tensor.entry.name]
        expected = record.after if merging else record.before
        if done.read != expected:
            raise ConflictError(
                f"{checkpoint.shards[done.tensor.shard].path}: tensor {record.entry.name!r} is {done.read}, expected "
                f"{expected}: something else has written there; restore this file from its source"
            )


def _put_in_order(directory: Path, *, merging: bool) -> None:
    """Step 4: names that loaders take, then the journal's end."""
    if merging and (directory / (RECEIPT + NEW)).exists():
        output.rename(directory / (RECEIPT + NEW), directory / RECEIPT)
    journal.put_back(directory)
    if not merging:
        output.remove(directory / RECEIPT)
    output.sync_directory(directory)
    output.remove(directory / JOURNAL)  # the last call: until here a second run finishes, from here on it is done


def _check_clean(directory: Path) -> None:
    if labels := merged_already(directory):
        raise ConflictError(f"{directory} has {', '.join(labels)} merged in already; unmerge that first, or give --out")


def _same(said: Receipt, used: Sequence[Used], compute: str) -> bool:
    there, here = ([(u.content_id, u.weight) for u in adapters] for adapters in (said.used, used))
    return (there, said.compute) == (here, compute)


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    if not directory.is_dir():
        raise NotFoundError(f"{directory}: no such directory")
    with output.locked(directory, str(directory)):
        yield
