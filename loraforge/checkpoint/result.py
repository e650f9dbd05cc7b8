"""What a merge or unmerge did, and the digests that prove it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loraforge.checkpoint.engine import Done, Fidelity, Job, run_jobs
from loraforge.checkpoint.reader import Checkpoint
from loraforge.checkpoint.receipt import NAME as RECEIPT
from loraforge.checkpoint.receipt import Receipt, Record
from loraforge.errors import ConflictError
from loraforge_registry.digest import Digest


@dataclass(frozen=True, slots=True)
class TensorResult:
    """One tensor that was changed, or would be."""

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    fidelity: Fidelity


@dataclass(frozen=True, slots=True)
class MergeResult:
    """What a merge did, or by ``preview_merge`` would do.

    ``base`` and ``merged`` are digests of all tensors, known where a receipt was asked for; ``left_out`` are files of
    the base's directory that do not come along.
    """

    out: Path | None
    tensors: tuple[TensorResult, ...]
    untouched: int
    nbytes: int
    base: Digest | None = None
    merged: Digest | None = None
    receipt_size: int = 0
    left_out: tuple[str, ...] = ()

    @property
    def touched_bytes(self) -> int:
        """The size of the tensors that change."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def fidelity(self) -> Fidelity:
        """How much of the updates survived, over all tensors."""
        return sum((tensor.fidelity for tensor in self.tensors), Fidelity())


def result_of(checkpoint: Checkpoint, receipt: Receipt, out: Path) -> MergeResult:
    """Return the result that a receipt tells of."""
    touched = {name: record for name, record in receipt.records.items() if record.touched}
    path = out / RECEIPT
    return MergeResult(
        out=out,
        tensors=results_of(
            checkpoint, {n: r.kind for n, r in touched.items()}, {n: r.fidelity for n, r in touched.items()}
        ),
        untouched=len(receipt.records) - len(touched),
        nbytes=checkpoint.nbytes,
        base=receipt.base,
        merged=receipt.merged,
        receipt_size=path.stat().st_size if path.exists() else 0,
    )


def results_of(
    checkpoint: Checkpoint, kinds: Mapping[str, str], fidelity: Mapping[str, Fidelity]
) -> tuple[TensorResult, ...]:
    """Return the tensors of a checkpoint that change (name to kind), in file order."""
    found = ((checkpoint.tensors[name], kind) for name, kind in kinds.items())
    return tuple(
        TensorResult(t.entry.name, kind, t.entry.shape, t.entry.dtype, t.nbytes, fidelity.get(t.entry.name, Fidelity()))
        for t, kind in sorted(found, key=lambda pair: (pair[0].shard, pair[0].begin))
    )


def check_tensors(checkpoint: Checkpoint, receipt: Receipt) -> None:
    """The checkpoint has the tensors of the receipt, whoever has written its files since."""
    found = {name: (t.entry.dtype, t.entry.shape) for name, t in checkpoint.tensors.items()}
    said = {name: (r.entry.dtype, r.entry.shape) for name, r in receipt.records.items()}
    for name in sorted(set(found) | set(said)):
        if found.get(name) != said.get(name):
            raise ConflictError(
                f"{checkpoint.path}: tensor {name!r} is {found.get(name, 'not there')}, "
                f"the receipt has {said.get(name, 'none of that name')}"
            )


def prove(record: Record, done: Done) -> None:
    """Refuse an unmerge whose tensor was not, or did not become, what the receipt says."""
    if done.read != record.after:
        raise ConflictError(
            f"tensor {record.entry.name!r} is not the one that the merge left (it has {done.read}, expected "
            f"{record.after}): something has changed it since; nothing was written"
        )
    if done.original != record.before:
        raise ConflictError(
            f"tensor {record.entry.name!r} came back as {done.original}, expected {record.before}; nothing was written"
        )


def untouched_record(done: Done) -> Record:
    """Return the record of a tensor that stays as it is."""
    assert done.original is not None, "hashed"  # noqa: S101 - run_jobs hashes unless told not to
    return Record(done.tensor.entry, done.original, done.original)


def untouched_records(
    checkpoint: Checkpoint, touched: Mapping[str, str], proof: Receipt | None = None
) -> dict[str, Record]:
    """Return the records of tensors that no adapter touches, checked where there is something to check against."""
    records = {}
    for done in run_jobs(checkpoint, [Job(t) for name, t in checkpoint.tensors.items() if name not in touched], None):
        record = untouched_record(done)
        if proof is not None:
            prove(proof.records[record.entry.name], done)
        records[record.entry.name] = record
    return records
