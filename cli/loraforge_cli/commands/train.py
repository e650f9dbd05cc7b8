"""``loraforge train``: an adapter from a base and data."""

import os
from typing import Any

import click

from loraforge_cli.options import Session, common
from loraforge_cli.sweep_settings import Sweep, is_sweep, read_sweep
from loraforge_cli.train_settings import read_settings, train_options
from loraforge_registry.names import RefName


@click.command("train")
@click.argument("settings", required=False, metavar="[YAML]", type=click.Path(dir_okay=False))
@train_options
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint in --run, to the same bits.")
@click.option("--force", is_flag=True, help="Move a tag that means another adapter.")
@click.option("--dry-run", is_flag=True, help="Say what would be trained, and show the first sample; train nothing.")
@common
def command(session: Session, *, settings: str | None, resume: bool, force: bool, dry_run: bool, **flags: Any) -> None:  # noqa: ANN401 - one for each flag
    """Train an adapter for a base on JSON lines, and store it with where it came from.

    \b
    loraforge train --base ./base --data french.jsonl --as french:v1
    loraforge train --base ./base --parent french:v1 --data law.jsonl --as french-law:v1
    loraforge train run.yaml --dry-run
    loraforge train run.yaml --run ./run --resume
    loraforge train sweep.yaml --dry-run
    torchrun --nproc-per-node 2 -m loraforge_cli train run.yaml

    A YAML file holds the same names as the flags; flags win. A line of data is a chat ("messages", "conversations"),
    "instruction" and "output", "prompt" and "completion", "input" and "output", "text", or "input_ids" and "labels".

    With "adapters" (names, and what each has of its own) or "grid" (settings, and a list of values for each) the file
    means several adapters, trained at once on one base; "halving: {first: STEPS, eta: 3}" drops the worst early.
    """  # noqa: D301 - click's mark for lines to leave as they are
    if settings is not None and is_sweep(settings):
        _sweep(session, read_sweep(settings, flags), resume=resume, force=force, dry_run=dry_run)
        return
    said = read_settings(settings, flags)
    if said.name is None and not dry_run:
        raise click.UsageError("say what to call the adapter: --as NAME[:TAG] (or --dry-run)")
    if resume and said.run is None:
        raise click.UsageError("--resume goes on from checkpoints: say where they are, --run DIR")
    name = None if said.name is None else RefName.parse(said.name)
    from loraforge_cli.train_ranks import joined
    from loraforge_cli.train_run import prepare, run_training, show_plan

    if dry_run or name is None:
        show_plan(session, prepare(session, said))
        return
    with joined(session) as mine:
        run_training(mine, prepare(mine, said), name, resume=resume, force=force)


def _sweep(session: Session, sweep: Sweep, *, resume: bool, force: bool, dry_run: bool) -> None:
    if resume and sweep.run is None:
        raise click.UsageError("--resume goes on from checkpoints: say where they are, --run DIR")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise click.UsageError("several adapters at once are trained by one process: leave torchrun out")
    from loraforge_cli.sweep_plan import show_sweep
    from loraforge_cli.sweep_run import prepare_sweep, run_sweep

    prepared = prepare_sweep(session, sweep)
    if dry_run:
        show_sweep(session, prepared)
    else:
        run_sweep(session, prepared, resume=resume, force=force)
