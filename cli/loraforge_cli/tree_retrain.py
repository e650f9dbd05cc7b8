"""A node trained again atop another parent, as its record says it was trained before."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loraforge.errors import CompositionError, ConflictError
from loraforge.training.provenance import data_digest
from loraforge.tree import Node, Tree
from loraforge.tree.nodes import below, path_of
from loraforge_cli.options import Session
from loraforge_cli.train_settings import FLAGS, read_settings
from loraforge_cli.tree_grow import Growth, grow_one
from loraforge_registry.canonical import Value
from loraforge_registry.manifest import Derivation


def retrain(session: Session, tree: Tree, path: str, onto: str, data: str, *, base: str | None, force: bool) -> Node:
    """Train ``path`` again on ``onto``, under its own name there; the old node stays where it is.

    Raises:
        CompositionError: it was not trained by loraforge, or the data is other data.
        ConflictError: something grew on it, which would stay behind.
    """
    record = tree.check_moves()
    node = tree.node(path)
    path_of(record, onto)
    left = below(record, path)
    if left and not force:
        raise ConflictError(f"{left[0]} grew on {path}, and stays on the old one: say that this is meant (--force)")
    derivation = node.manifest.derivation
    if derivation is None or derivation.operation != "train":
        made = "imported" if derivation is None else f"made by {derivation.operation}"
        raise CompositionError(f"{path} was {made}, not trained here: rebase it without --retrain")
    _check_data(derivation, data)
    flags = {**_flags(derivation), "base": str(tree.base(base)), "data": data}
    place = f"{onto}/{path.rpartition('/')[2]}".removeprefix("/")
    return grow_one(session, tree, Growth(place, read_settings(None, flags)), resume=False)


def _check_data(derivation: Derivation, data: str) -> None:
    folder = Path(data).expanduser()
    names = ("train.jsonl", "valid.jsonl")
    files = [folder / name for name in names if (folder / name).is_file()] if folder.is_dir() else [folder]
    found = str(data_digest(files))
    if found != derivation.parameters.get("data"):
        raise CompositionError(
            f"{data} is not what it was trained on: {found[:19]}, its record says "
            f"{str(derivation.parameters.get('data'))[:19]}; train a new node on it instead (loraforge tree grow)"
        )


def _flags(derivation: Derivation) -> Mapping[str, Any]:
    """Return the settings of a training as flags; those that it does not name are the defaults."""
    known = {name: value for name, value in derivation.parameters.items() if name in FLAGS and _own(name)}
    return {name: _spelt(value) for name, value in known.items()}


def _own(name: str) -> bool:
    return name not in ("base", "data", "parent", "as", "run", "valid")


def _spelt(value: Value) -> Value:
    return value
