"""What merge, unmerge and verify share: what they print, and that their adapters stay findable."""

import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import click

from loraforge.checkpoint.fidelity import Fidelity
from loraforge.checkpoint.receipt import Receipt
from loraforge.checkpoint.result import MergeResult, TensorResult
from loraforge.registry import Registry
from loraforge_cli.options import Session
from loraforge_cli.output import by_layer, emit, note, size, table
from loraforge_registry.names import RefName
from loraforge_registry.paths import is_path

_MUCH = 0.1  # of an update lost in rounding: worth a word


def keep_sources(registry: Registry, sources: Sequence[str]) -> None:
    """Store adapters given as directories: a receipt that names what nobody can find again undoes nothing.

    Each gets a name, ``merged:<digits>``, so that a collection leaves it alone until somebody takes the name away.
    """
    for source in sources:
        if is_path(source):
            with registry.store.session():
                digest = registry.push(source)
                registry.store.tag(digest, RefName("merged", digest.short), what="merge")


@contextmanager
def progress_bar(session: Session, what: str) -> Iterator[Callable[[int], object] | None]:
    """Show bytes going by, on a terminal only."""
    if session.quiet or not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    with tqdm(desc=what, unit="B", unit_scale=True, leave=False, file=sys.stderr) as bar:
        yield bar.update


def print_merge(session: Session, result: MergeResult, *, dry_run: bool = False) -> None:
    """Print what was merged, or would be."""
    if session.as_json:
        emit(_as_json(result, dry_run=dry_run))
        return
    touched = f"{len(result.tensors)} tensors ({size(result.touched_bytes)} of {size(result.nbytes)})"
    if dry_run:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        click.echo(f"would change {touched}; needs {size(result.nbytes)} of disk, about {size(peak)} of memory")
    else:
        receipt = f", receipt {size(result.receipt_size)}" if result.receipt_size else ", no receipt"
        click.echo(f"{result.out}  {touched}{receipt}")
    if not session.quiet:
        click.echo("\n" + _fidelity_table(result))
    _advise(session, result)


def print_unmerge(session: Session, result: MergeResult, *, all_of_them: bool) -> None:
    """Print what came back."""
    if session.as_json:
        emit(_as_json(result, dry_run=False))
        return
    said = "every digest is the base's" if all_of_them else "with a new receipt"
    click.echo(f"{result.out}  {len(result.tensors)} tensors taken back ({size(result.touched_bytes)}), {said}")
    if result.base is not None:
        note(f"base {result.base}", quiet=session.quiet)


def used_lines(receipt: Receipt) -> list[dict[str, object]]:
    """Return the adapters of a receipt for scripts."""
    return [
        {
            "name": used.label,
            "weight": used.weight,
            "content_id": str(used.content_id),
            "digest": None if used.digest is None else str(used.digest),
        }
        for used in receipt.used
    ]


def _advise(session: Session, result: MergeResult) -> None:
    for name in result.left_out:
        note(f"left out {name}: weights of the base in another format", quiet=session.quiet)
    found = {t.dtype for t in result.tensors if t.fidelity.error > _MUCH}
    if result.fidelity.error > _MUCH:
        note(
            f"rounding to {', '.join(sorted(found))} loses {result.fidelity.error:.0%} of the update; a base in "
            "float32, or serving the adapter unmerged, keeps it",
            quiet=session.quiet,
        )


def _fidelity_table(result: MergeResult) -> str:
    by_name = {tensor.name: tensor for tensor in result.tensors}
    rows = []
    for label, names in by_layer(by_name).items():
        found = [by_name[name] for name in names]
        rows.append([label, str(len(found)), found[0].dtype, *_figures(found)])
    rows.append(["all", str(len(by_name)), "", *_figures(result.tensors)])
    return table(["TENSOR", "N>", "TYPE", "CHANGED>", "LOST>"], rows)


def _figures(tensors: Sequence[TensorResult]) -> list[str]:
    seen = sum((tensor.fidelity for tensor in tensors), Fidelity())
    lost = f"{seen.error:.2%}" if seen.wanted else "-"
    return [f"{seen.share_changed:.1%}" if seen.measured else "-", lost]


def _as_json(result: MergeResult, *, dry_run: bool) -> dict[str, object]:
    return {
        "dry_run": dry_run,
        "out": None if result.out is None else str(result.out),
        "base": None if result.base is None else str(result.base),
        "merged": None if result.merged is None else str(result.merged),
        "size": result.nbytes,
        "touched": result.touched_bytes,
        "receipt_size": result.receipt_size,
        "error": result.fidelity.error,
        "changed": result.fidelity.share_changed,
        "left_out": list(result.left_out),
        "tensors": {
            t.name: {
                "kind": t.kind,
                "shape": list(t.shape),
                "dtype": t.dtype,
                "error": t.fidelity.error if t.fidelity.wanted else None,
                "changed": t.fidelity.share_changed,
            }
            for t in result.tensors
        },
    }
