"""``loraforge tree eval``."""

import math
from pathlib import Path
from typing import Literal

import click

from loraforge_cli.options import Session, common
from loraforge_cli.output import emit, note, table
from loraforge_cli.trees.common import base_option, open_tree, tree_argument
from loraforge_registry.trees import parent_path


@click.command("eval")
@tree_argument
@click.option("--data", metavar="FILE", required=True, help="JSON lines, as train takes them.")
@click.option("--batch-size", type=click.IntRange(1), default=4, show_default=True, help="Samples at a time.")
@click.option("--max-length", type=click.IntRange(1), default=1024, show_default=True, help="Cut samples to this.")
@click.option("--mask", type=click.Choice(["prompt", "last", "none"]), default="prompt", show_default=True)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps.")
@base_option
@common
def command(
    session: Session,
    *,
    tree: str,
    data: str,
    batch_size: int,
    max_length: int,
    mask: Literal["prompt", "last", "none"],
    device: str,
    base: str | None,
) -> None:
    """Compute the loss of the base and of every node on some data, in one model that goes from node to node."""
    opened = open_tree(session, tree)
    from loraforge_cli.tree_eval import losses

    found = {}
    for judged in losses(
        opened,
        Path(data).expanduser(),
        base=opened.base(base),
        batch_size=batch_size,
        max_length=max_length,
        mask=mask,
        device=device,
    ):
        found[judged.path] = judged.loss
        note(f"{judged.path or 'the base'}  {judged.loss:.4f}", quiet=session.quiet or session.as_json)
    if session.as_json:
        emit({"base": found[""], "nodes": {path: loss for path, loss in found.items() if path}})
        return
    rows = [[path or "(base)", f"{loss:.4f}", _perplexity(loss), _gain(found, path)] for path, loss in found.items()]
    click.echo(table(["NODE", "LOSS>", "PERPLEXITY>", "TO PARENT>"], rows))


def _perplexity(loss: float) -> str:
    return f"{math.exp(loss):.4g}" if loss < 50 else "-"


def _gain(found: dict[str, float], path: str) -> str:
    return "" if not path else f"{found[path] - found[parent_path(path) or '']:+.4f}"
