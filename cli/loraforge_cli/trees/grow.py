"""``loraforge tree grow``."""

from functools import partial
from typing import Any

import click

from loraforge_cli.options import Session, common
from loraforge_cli.train_settings import read_settings, train_options
from loraforge_cli.trees.common import base_option, open_tree, print_nodes, tree_argument

_OWN = ("base", "parent", "as", "data")


@click.command("grow")
@tree_argument
@click.argument("nodes", metavar="NODE...", nargs=-1, required=True)
@click.option("--data", metavar="PATH", multiple=True, required=True, help="JSON lines; one for all, or one a NODE.")
@click.option("--settings", metavar="YAML", type=click.Path(dir_okay=False), help="Flags in a file, as train takes.")
@base_option
@partial(train_options, without=_OWN)
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint in --run, to the same bits.")
@click.option("--in-turns", is_flag=True, help="Siblings one after the other, each to the bit what it is alone.")
@click.option("--dry-run", is_flag=True, help="Say what would be trained, and show the first sample; train nothing.")
@common
def command(
    session: Session,
    *,
    tree: str,
    nodes: tuple[str, ...],
    data: tuple[str, ...],
    settings: str | None,
    base: str | None,
    resume: bool,
    in_turns: bool,
    dry_run: bool,
    **flags: Any,  # noqa: ANN401 - one for each flag
) -> None:
    """Train NODE atop the weights of its parent, and put it into the tree; siblings at once, on one base.

    \b
    loraforge tree grow law-tree french --data french.jsonl
    loraforge tree grow law-tree french/law french/medicine --data law.jsonl --data medicine.jsonl

    french is trained atop the base, french/law atop round(base + french), the weights that loraforge tree merge writes.
    """  # noqa: D301 - click's mark for lines to leave as they are
    if len(data) not in (1, len(nodes)):
        raise click.UsageError(f"{len(data)} --data for {len(nodes)} nodes: give one for all, or one for each")
    if len(set(nodes)) != len(nodes):
        raise click.UsageError("a node stands twice; name each once")
    if resume and flags.get("run") is None:
        raise click.UsageError("--resume goes on from checkpoints: say where they are, --run DIR")
    opened = open_tree(session, tree)
    from loraforge_cli.train_ranks import joined
    from loraforge_cli.tree_grow import Growth, grow, show

    _check_places(opened.check_moves().nodes, nodes)
    place = str(opened.base(base))
    every = data * len(nodes) if len(data) == 1 else data
    growths = [
        Growth(path, read_settings(settings, {**flags, "base": place, "data": file}))
        for path, file in zip(nodes, every, strict=True)
    ]
    if dry_run:
        show(session, opened, growths[0])
        return
    with joined(session) as mine:
        print_nodes(mine, grow(mine, opened, growths, resume=resume, in_turns=in_turns))


def _check_places(known: Any, nodes: tuple[str, ...]) -> None:  # noqa: ANN401 - a mapping
    """Find out before hours of training that a place is taken, or that there is nothing to grow on."""
    from loraforge.errors import ConflictError, NotFoundError
    from loraforge_registry.trees import check_path, parent_path

    here = set(known)
    for path in nodes:
        check_path(path)
        above = parent_path(path)
        if path in here:
            raise ConflictError(f"{path} is there already: prune or move it first, or choose another name")
        if above is not None and above not in here:
            raise NotFoundError(f"there is no {above} to grow {path} on; name it first")
        here.add(path)
