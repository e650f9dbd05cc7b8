"""The adapters of a merge: those that a caller names, and those that a receipt does."""

import math
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeAlias

from loraforge.adapter import Adapter, content_id, named_tensors
from loraforge.adapter.mapped import make_expendable
from loraforge.checkpoint.changes import Dora
from loraforge.checkpoint.engine import Undo
from loraforge.checkpoint.plan import Ingredient, plan_changes
from loraforge.checkpoint.reader import Checkpoint
from loraforge.checkpoint.receipt import NAME as RECEIPT
from loraforge.checkpoint.receipt import Receipt, ReceiptFile, Used
from loraforge.errors import CompositionError, ConflictError, NotFoundError
from loraforge.registry import Registry, load
from loraforge_registry.paths import AnyPath, expand, is_path

Source: TypeAlias = Adapter | AnyPath


def ingredients_of(
    adapters: "Source | Sequence[Source | tuple[Source, float]]", registry: Registry | None
) -> tuple[tuple[Used, ...], list[Ingredient]]:
    """Load adapters, and say which they are."""
    used, ingredients = [], []
    for number, (source, weight) in enumerate(_weighted(adapters)):
        if not math.isfinite(weight):
            raise CompositionError(f"a weight is {weight}; expected a finite number")
        adapter = _opened(source, registry)
        label = f"adapter {number + 1}" if isinstance(source, Adapter) else os.fspath(source)
        digest = None if adapter.origin is None else adapter.origin.digest
        used.append(Used(label, float(weight) + 0.0, content_id(adapter), digest))
        ingredients.append(Ingredient(adapter, float(weight), label))
    return tuple(used), ingredients


def check_outside(out: Path, adapters: "Source | Sequence[Source | tuple[Source, float]]") -> None:
    """Refuse an output in the directory of an adapter that goes in.

    Raises:
        ConflictError: naming both.
    """
    for source, _ in _weighted(adapters):
        if isinstance(source, Adapter) or not is_path(source):
            continue
        if out.resolve().is_relative_to(expand(source).resolve()):
            raise ConflictError(f"{out} is inside the input {source}; name a directory elsewhere")


def find_adapters(receipt: Receipt, given: Sequence[Source], registry: Registry | None) -> list[Ingredient]:
    """Return the adapters of a receipt: those given, else by what they compute from the store.

    Raises:
        NotFoundError: naming the first that is nowhere to be found.
    """
    registry = registry or Registry()
    loaded = [_opened(source, registry) for source in given]
    by_content = {content_id(adapter): adapter for adapter in loaded}
    found = []
    for used in receipt.used:
        adapter = by_content.get(used.content_id)
        if adapter is None:
            digest = registry.store.find_content(used.content_id)
            if digest is None:
                raise NotFoundError(
                    f"adapter {used.label} (content {used.content_id.short}) is not in the store; give its directory "
                    "with --adapter, or push it first"
                )
            adapter = _opened(str(digest), registry)
        found.append(Ingredient(adapter, used.weight, used.label))
    return found


def _weighted(adapters: "Source | Sequence[Source | tuple[Source, float]]") -> list[tuple[Source, float]]:
    if isinstance(adapters, Mapping):  # its values would be lost without a word
        raise CompositionError("adapters are given as a mapping; expected a list of (adapter, weight)")
    given = [adapters] if isinstance(adapters, Adapter | str | os.PathLike) else list(adapters)
    return [item if isinstance(item, tuple) else (item, 1.0) for item in given]


def _opened(source: Source, registry: Registry | None) -> Adapter:
    """Return an adapter; the memory of one that is opened here, which nobody else has, is let go as it is used."""
    if isinstance(source, Adapter):
        return source
    adapter = load(source, registry=registry)
    make_expendable(named_tensors(adapter).values())
    return adapter


def check_unchanged(used: Sequence[Used], ingredients: Sequence[Ingredient]) -> None:
    """Refuse what was made of files that somebody has written into meanwhile; what lies in a store never changes.

    Cost: reads those adapters once more.

    Raises:
        ConflictError: naming the adapter.
    """
    for said, ingredient in zip(used, ingredients, strict=True):
        if ingredient.adapter.origin is None and content_id(ingredient.adapter) != said.content_id:
            raise ConflictError(
                f"{said.label} changed while it was read; nothing was written. Try again when nobody writes to it"
            )


def plan_undo(
    checkpoint: Checkpoint, file: ReceiptFile, ingredients: Sequence[Ingredient], *, compute: str = "exact"
) -> dict[str, Undo]:
    """Return how each touched tensor is taken back.

    Raises:
        ConflictError: the adapters do not touch the tensors that the receipt says they did.
    """
    touched = {name: record for name, record in file.receipt.records.items() if record.touched}
    changes = plan_changes(checkpoint, ingredients, compute=compute, undoing=True) if ingredients else {}
    if {name: change.kind for name, change in changes.items()} != {n: r.kind for n, r in touched.items()}:
        raise ConflictError(f"{file.path}: the adapters it names touch other tensors than it says they did")
    for name, change in changes.items():
        if isinstance(change, Dora):
            change.load(touched[name].aux)
    return {name: Undo(change, partial(file.residual, name)) for name, change in changes.items()}


def receipt_of(checkpoint: Checkpoint, receipt: AnyPath | None) -> ReceiptFile:
    """Open the receipt of a merged checkpoint.

    Raises:
        NotFoundError: there is none.
        FormatError: it is damaged.
    """
    directory = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    path = directory / RECEIPT if receipt is None else expand(receipt)
    if not path.exists():
        raise NotFoundError(
            f"{path}: there is no receipt, so what was merged is unknown (it lies beside a merge's output, unless "
            "--no-receipt was given)"
        )
    return ReceiptFile(path)
