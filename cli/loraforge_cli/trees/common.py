"""What the commands of a tree share."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from loraforge_cli.options import Session
from loraforge_cli.output import emit, note

if TYPE_CHECKING:
    from loraforge.tree import Node, Tree

F = TypeVar("F", bound=Callable[..., object])


def tree_argument(function: F) -> F:
    """TREE, the first argument of each of them."""
    return click.argument("tree", metavar="TREE")(function)


def base_option(function: F) -> F:
    """--base, where the base is not where it was."""
    return click.option("--base", metavar="DIR", help="Where the base is now, if it was moved.")(function)


def open_tree(session: Session, name: str) -> "Tree":
    """Open a tree, and torch with it."""
    from loraforge.registry import Registry
    from loraforge.tree import Tree

    return Tree.open(Registry(session.store_path), name)


def print_nodes(session: Session, nodes: "Iterable[Node]") -> None:
    """Print nodes as they come; for scripts one document, a list where they are several."""
    found = []
    for node in nodes:
        found.append(node)
        if not session.as_json:
            print_node(session, node)
    if session.as_json:
        emit(_as_json(found[0]) if len(found) == 1 else [_as_json(node) for node in found])


def _as_json(node: "Node") -> dict[str, object]:
    from loraforge_cli.describe import describe

    described = describe(node.tree.registry.store, node.digest)
    return {**described.as_json(), "node": node.path, "tree": str(node.tree.digest)}


def print_node(session: Session, node: "Node", **more: Any) -> None:  # noqa: ANN401 - of any JSON type
    """Print the node that an operation made."""
    from loraforge_cli.describe import describe
    from loraforge_cli.summary import line

    described = describe(node.tree.registry.store, node.digest)
    if session.as_json:
        emit({**_as_json(node), **more})
        return
    click.echo(f"{node.path}  {line(described)}")
    error = (described.manifest.report or {}).get("error")
    if isinstance(error, float):
        note(f"{error:.3g} of |dW| was lost to the rank", quiet=session.quiet)
