"""Training atop another adapter: the base is then the checkpoint that ``loraforge merge`` would write."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraforge.adapter import Adapter, content_id
from loraforge.checkpoint.merge import merge
from loraforge.errors import CompositionError
from loraforge_cli.options import Session
from loraforge_cli.sources import open_source
from loraforge_cli.train_base import load_model
from loraforge_registry.digest import Digest

_IN_MESSAGES = "adapter 1: "  # what a merge calls an adapter that has no name


@dataclass(frozen=True)
class Parent:
    """An adapter to train atop of, what the user calls it, and what it computes.

    ``path`` are all the adapters that the weights to train on have in them, where that is a path in a tree.
    """

    source: str
    adapter: Adapter
    content_id: Digest
    path: tuple[Adapter, ...] = ()


def open_parent(session: Session, source: str | None) -> Parent | None:
    """Open the parent, if there is one; it stays this adapter, wherever its name moves while the run goes on."""
    if source is None:
        return None
    adapter = open_source(session, source)
    return Parent(source, adapter, content_id(adapter))


def load_atop(base: str, parent: Parent | None, precision: str) -> Any:  # noqa: ANN401 - transformers' models have no types here
    """Load a base with the parent merged in: ``W_parent = round(W + dW_parent)``, rounded once into the stored type.

    Merged on disk and loaded from there: whatever a loader does with names, ties and types happens after the rounding.

    Cost: the base's size in the directory for temporary files, until it is loaded; each process has its own.

    Raises:
        CompositionError: the parent does not fit the base.
        LoraforgeError: as ``load_model`` and ``merge``.
    """
    if parent is None:
        return load_model(base, precision)
    with tempfile.TemporaryDirectory(prefix="loraforge-parent-") as folder:
        merged = Path(folder) / "merged"
        try:
            merge(base, list(parent.path or (parent.adapter,)), merged, receipt=False)
        except CompositionError as error:
            why = str(error).removeprefix(_IN_MESSAGES)
            raise CompositionError(f"the parent {parent.source} does not fit {base}: {why}") from error
        return load_model(base, precision, merged)
