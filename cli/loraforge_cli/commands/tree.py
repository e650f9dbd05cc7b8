"""``loraforge tree``: adapters grown on adapters."""

from collections.abc import Mapping

import click

from loraforge_cli.lazy import Commands

# name: (module, summary). --help reads this table and imports no command.
TABLE: Mapping[str, tuple[str, str]] = {
    "create": ("create", "A new tree on a base."),
    "grow": ("grow", "Train nodes atop others, or atop the base."),
    "show": ("show", "The tree: ranks, sizes, losses, digests; as text, SVG or JSON."),
    "log": ("log", "What was done to it."),
    "diff": ("diff", "How two nodes, or two states of a tree, differ."),
    "eval": ("evaluate", "The loss of every node on some data."),
    "merge": ("merge", "Write a node's weights as a checkpoint."),
    "flatten": ("flatten", "A node and all below it as one plain adapter."),
    "graft": ("graft", "Put an adapter from elsewhere into the tree."),
    "move": ("move", "Rename a node, or put its update onto another one."),
    "rebase": ("rebase", "Put a node onto another one, with the same weights or trained again."),
    "squash": ("squash", "Make one node of a chain, with the same weights."),
    "prune": ("prune", "Take a node away."),
}


@click.command("tree", cls=Commands, table=TABLE, package="loraforge_cli.trees")
def command() -> None:
    """Grow adapters on adapters.

    A TREE is a name in the store. A NODE is a path in it: french/law is the node law, trained atop base + french. Its
    weights are round(base + all updates on its path): one rounding. Every change moves the tree's name once; what it
    was before stays in the store until a gc (loraforge tree log).
    """
