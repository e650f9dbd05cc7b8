"""A tree as commands print it: a line for every node, as text and for scripts. Nothing here needs torch."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import click

from loraforge_cli.describe import describe
from loraforge_cli.options import Session
from loraforge_cli.output import count, emit, one_line, size, spread
from loraforge_registry.digest import Digest
from loraforge_registry.errors import LoraforgeError
from loraforge_registry.names import RefName
from loraforge_registry.store import Store
from loraforge_registry.trees import TreeRecord, parent_path

TRAINED = "train"


@dataclass(frozen=True)
class Shown:
    """What is said of a node; ``problem`` where it cannot be read."""

    path: str
    digest: Digest
    ranks: tuple[int, ...] = ()
    targets: int = 0
    parameters: int = 0
    size: int = 0
    made_by: str = ""
    loss: float | None = None
    eval_loss: float | None = None
    error: float | None = None
    problem: str | None = None

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition("/")[2]

    @property
    def facts(self) -> list[str]:
        """What a line says, the most telling first."""
        if self.problem is not None:
            return ["DAMAGED"]
        judged = self.loss if self.eval_loss is None else self.eval_loss
        said = [f"rank {spread(self.ranks)}", f"{count(self.parameters)} parameters", size(self.size)]
        said += [] if judged is None else [f"{'loss' if self.eval_loss is None else 'eval'} {judged:.4g}"]
        said += [] if self.error is None else [f"error {self.error:.2g}"]
        return said + ([] if self.made_by == TRAINED else [self.made_by])


@dataclass(frozen=True)
class View:
    """A tree with all its nodes, parents before children."""

    ref: RefName | None
    digest: Digest
    record: TreeRecord
    nodes: tuple[Shown, ...]

    def children(self, path: str) -> list[Shown]:
        """The nodes on one; those on the base for ``""``."""
        return [node for node in self.nodes if (parent_path(node.path) or "") == path]

    def as_json(self) -> dict[str, object]:
        """The document that ``--json`` prints."""
        return {
            "digest": str(self.digest),
            "name": self.ref.name if self.ref else None,
            "tag": self.ref.tag if self.ref else None,
            "base": {"digest": str(self.record.base), "name": self.record.base_name},
            "nodes": {node.path: _node_as_json(node) for node in self.nodes},
        }


def view(store: Store, digest: Digest, ref: RefName | None = None) -> View:
    """Read all that is said of a tree; a node that is damaged is said to be."""
    record = store.tree(digest)
    return View(ref, digest, record, tuple(_shown(store, path, node) for path, node in sorted(record.nodes.items())))


def lines(tree: View) -> Iterator[str]:
    """Yield the tree as text: a line a node, the facts aligned."""
    name = str(tree.ref) if tree.ref else "tree"
    yield one_line(f"{name}  sha256:{tree.digest.short}  on {tree.record.base_name}")
    drawn = list(_branches(tree, "", ""))
    width = max((len(label) for label, _ in drawn), default=0)
    for label, node in drawn:
        yield one_line(f"{label.ljust(width)}  {node.digest.short}  {', '.join(node.facts)}")


def summary(tree: View) -> str:
    """One line about the whole."""
    name = f"{tree.ref}  " if tree.ref else ""
    nodes = len(tree.nodes)
    total = sum(node.size for node in tree.nodes)
    return f"{name}sha256:{tree.digest.short}  a tree of {nodes} node{'s' * (nodes != 1)}, {size(total)}"


def is_tree(store: Store, digest: Digest) -> bool:
    """Whether what has this digest is a tree."""
    return isinstance(store.record(digest), TreeRecord)


def show_tree(session: Session, store: Store, digest: Digest, ref: RefName | None) -> None:
    """Print a tree where a command shows everything about one thing."""
    seen = view(store, digest, ref)
    if session.as_json:
        emit(seen.as_json())
    else:
        click.echo("\n".join(lines(seen)))


def print_tree(session: Session, tree: View, directory: str | None = None) -> None:
    """Print a line about a tree where a command prints one about an adapter."""
    if session.as_json:
        emit({**tree.as_json(), **({} if directory is None else {"directory": directory})})
    else:
        click.echo(f"{'' if directory is None else f'{one_line(directory)}  '}{summary(tree)}")


def _branches(tree: View, path: str, indent: str) -> Iterator[tuple[str, Shown]]:
    children = tree.children(path)
    for node in children:
        last = node is children[-1]
        yield f"{indent}{'└─ ' if last else '├─ '}{node.name}", node
        yield from _branches(tree, node.path, indent + ("   " if last else "│  "))


def _shown(store: Store, path: str, digest: Digest) -> Shown:
    try:
        found = describe(store, digest)
    except (LoraforgeError, OSError) as error:
        return Shown(path, digest, problem=str(error.args[-1]))
    manifest, report = found.manifest, found.manifest.report or {}

    def number(key: str) -> float | None:
        return cast("float", report[key]) if isinstance(report.get(key), float) else None

    return Shown(
        path=path,
        digest=digest,
        ranks=tuple(found.ranks),
        targets=len(found.ranks),
        parameters=manifest.parameters,
        size=manifest.size,
        made_by=manifest.derivation.operation if manifest.derivation else "import",
        loss=number("loss"),
        eval_loss=number("eval_loss"),
        error=number("error"),
    )


def _node_as_json(node: Shown) -> dict[str, object]:
    return {
        "digest": str(node.digest),
        "parent": parent_path(node.path),
        "rank": max(node.ranks, default=None),
        "targets": node.targets,
        "parameters": node.parameters,
        "size": node.size,
        "operation": node.made_by or None,
        "loss": node.loss,
        "eval_loss": node.eval_loss,
        "error": node.error,
        "problem": node.problem,
    }
