"""``loraforge demo``: the main job, end to end, on what it makes itself."""

import contextlib
import importlib.util
import io
import shlex
import sys
import tempfile
from pathlib import Path

import click

from loraforge_cli.options import Session, common
from loraforge_cli.output import emit, table


@click.command("demo")
@click.option("--keep", metavar="DIR", help="Work in DIR, and leave everything there.")
@common
def command(session: Session, *, keep: str | None) -> None:
    """See it all work, offline, in a minute: train, compose, re-rank, trace, pull, load in PEFT, compare."""
    missing = [name for name in ("transformers", "peft") if importlib.util.find_spec(name) is None]
    if missing:
        raise click.UsageError(f"the demo needs {' and '.join(missing)}: pip install 'loraforge[demo]'")
    with contextlib.ExitStack() as stack:
        folder = Path(keep) if keep else Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="loraforge-")))
        folder.mkdir(parents=True, exist_ok=True)
        folder = folder.resolve()
        if any(folder.iterdir()):
            raise click.UsageError(f"{folder} is not empty; name a new directory")
        stack.enter_context(contextlib.chdir(folder))  # so that what is shown is what is run
        if session.as_json:
            with contextlib.redirect_stdout(io.StringIO()):
                results = _run(folder)
            emit(results)
        else:
            _run(folder)
            if keep:
                click.echo(f"\nEverything is in {folder}.")


def _run(folder: Path) -> dict[str, object]:
    from loraforge_cli import demo_model as demo
    from loraforge_cli.demo_tasks import NUMBERS, TASKS, UNSEEN, write_data

    demo.be_quiet()
    parameters, seconds = demo.timed(lambda: demo.make_base(folder / "base"))
    click.echo(f"A base: Llama with {parameters:,} random parameters ({seconds:.1f} s).")
    write_data(folder)
    click.echo(
        f"Two tasks: 'french' spells the numbers 1 to {max(NUMBERS)}, 'law' writes them as Roman numerals; both keep "
        f"{len(UNSEEN)} aside."
    )
    for task in TASKS:
        _train(folder, task)
    found = _judge(folder)
    terms = [f"{task}:v1={demo.WEIGHTS[task]}" for task in TASKS]
    _loraforge(folder, "compose", *terms, "--rank", str(demo.RANK), "--as", "french-law:v1")
    _loraforge(folder, "show", "french-law:v1")
    _loraforge(folder, "ls")
    for name in (*TASKS, "french-law"):
        _loraforge(folder, "pull", f"{name}:v1", "--to", f"./{name}")
    return {"losses": found, **_compare(folder)}


def _train(folder: Path, task: str) -> None:
    from loraforge_cli.demo_model import ALPHAS, RANK

    task_and_name = ("--base", "./base", "--data", f"./{task}.jsonl", "--as", f"{task}:v1")
    shape = ("--rank", str(RANK), "--alpha", str(ALPHAS[task]))
    _loraforge(folder, "train", *task_and_name, *shape, "--lr", "3e-3", "--epochs", "20")


def _judge(folder: Path) -> dict[str, dict[str, float]]:
    """Show that each adapter has learned its own task, and only that."""
    from loraforge.registry import Registry
    from loraforge_cli.demo_model import load_base
    from loraforge_cli.demo_tasks import EXAMPLES, TASKS, UNSEEN, judge, prompt

    store, model = Registry(folder / "store"), load_base(folder / "base")
    adapters = {"(the base)": None} | {f"{task}:v1": store.load(f"{task}:v1") for task in TASKS}
    judged = {name: judge(model, adapter, folder) for name, adapter in adapters.items()}
    click.echo(f"\nLoss on the {len(UNSEEN)} numbers that neither was trained on:\n")
    rows = [[name, *(f"{loss:.2f}" for loss in losses.values()), *texts] for name, (losses, texts) in judged.items()]
    header = ["ADAPTER", *(f"{task.upper()}>" for task in TASKS), *(prompt(number).strip() for number in EXAMPLES)]
    click.echo(table(header, rows))
    return {name: losses for name, (losses, _) in judged.items()}


def _loraforge(folder: Path, *arguments: str) -> None:
    """Run a command as a user would, and show it."""
    from loraforge_cli.main import cli

    click.echo(f"\n$ loraforge {shlex.join(arguments)}")
    unseen = [] if sys.stderr.isatty() else ["--quiet"]  # a bar goes away again, lines of a log would stay
    cli.main([*arguments, "--store", str(folder / "store"), *unseen], standalone_mode=False)


def _compare(folder: Path) -> dict[str, object]:
    """Check the claims: errors against float64, times, and what PEFT gives on the same input."""
    import loraforge as lf
    from loraforge_cli import demo_model as demo
    from loraforge_cli.demo_tasks import TASKS

    folders = {task: folder / task for task in TASKS}
    terms = [(lf.load(folders[task]), demo.WEIGHTS[task]) for task in folders]
    exact = demo.dense_sum(terms)
    blend, seconds = demo.timed(lambda: lf.linear(terms))
    small, seconds_small = demo.timed(lambda: lf.rerank(blend, rank=demo.RANK))
    rows = [
        demo.Combined("loraforge linear", str(2 * demo.RANK), demo.adapter_error(blend, exact), seconds),
        demo.Combined(
            f"loraforge linear, rank {demo.RANK}",
            str(demo.RANK),
            demo.adapter_error(small.adapter, exact),
            seconds_small,
        ),
        *demo.combine_in_peft(base=folder / "base", folders=folders, exact=exact),
    ]
    click.echo("\n0.7 french + 0.3 law, against the sum of the dense updates in float64:\n")
    shown = [[row.name, row.rank, f"{row.error:.2g}", f"{row.seconds * 1000:,.0f} ms"] for row in rows]
    click.echo(table(["METHOD", "RANK>", "ERROR>", "TIME>"], shown))
    itself = lf.linear([(terms[0][0], 0.5), (terms[0][0], 0.5)])
    ours = demo.error_of(demo.dense_sum([(itself, 1.0)]), demo.dense_sum([(terms[0][0], 1.0)]))
    theirs = demo.average_with_itself_in_peft(folder / "base", folders["french"])
    lf.save(blend, folder / "exact")
    gap, largest = demo.logits_gap(folder / "base", folder / "exact", exact)
    click.echo(
        f"\nre-ranked: reported error {small.report.error:.6f}, measured {rows[1].error:.6f}\n"
        f"french averaged with itself: loraforge is off by {ours:.1g}; PEFT's linear gives {theirs:.2f} times it\n"
        f"PEFT with our sum against base + dense sum: logits differ by {gap:.1g} of {largest:.2g}"
    )
    return {
        "methods": [row.__dict__ for row in rows],
        "reported_error": small.report.error,
        "self_average": {"loraforge_error": ours, "peft_factor": theirs},
        "logits": {"difference": gap, "largest": largest},
    }
