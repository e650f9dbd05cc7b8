"""``loraforge demo``: the main job, end to end, on what it makes itself."""

import contextlib
import hashlib
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
    """See it all work, offline, in a minute: grow a tree, judge it, compose, rebuild, merge, unmerge, push, pull."""
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
    from loraforge_cli.demo_tasks import NUMBERS, UNSEEN, write_data

    demo.be_quiet()
    parameters, seconds = demo.timed(lambda: demo.make_base(folder / "base"))
    click.echo(f"A base: Llama with {parameters:,} random parameters ({seconds:.1f} s).")
    write_data(folder)
    click.echo(
        f"Two tasks: 'french' spells the numbers 1 to {max(NUMBERS)}, 'law' writes them as Roman numerals; and a "
        f"little one atop\neach: 'loud' in capitals, 'quiet' in small letters. All keep {len(UNSEEN)} numbers aside."
    )
    _grow(folder)
    judged = _judge(folder)
    _combine(folder)
    claims = _compare(folder)
    return {"losses": judged, **claims, "base_again": _merge_and_back(folder), "pulled": _share(folder)}


def _grow(folder: Path) -> None:
    """Train two adapters at once, and a child atop each."""
    from loraforge_cli.demo_model import ALPHA, RANK
    from loraforge_cli.demo_tasks import CHILDREN, ROOTS, file_of

    _loraforge(folder, "tree", "create", "numbers", "--base", "./base")
    for nodes, rank, epochs in ((ROOTS, RANK, 20), (CHILDREN, 8, 16)):
        data = [part for path in nodes for part in ("--data", f"./{file_of(path)}.jsonl")]
        shape = ("--rank", str(rank), "--alpha", str(ALPHA), "--lr", "3e-3", "--epochs", str(epochs))
        _loraforge(folder, "tree", "grow", "numbers", *nodes, *data, *shape)
    _loraforge(folder, "tree", "show", "numbers")
    _loraforge(folder, "tree", "show", "numbers", "--format", "svg", into="numbers.svg")


def _judge(folder: Path) -> dict[str, dict[str, float]]:
    """Show that each node has learned its own task, and only that."""
    from loraforge.registry import Registry
    from loraforge.tree import Tree
    from loraforge_cli.demo_model import load_base
    from loraforge_cli.demo_tasks import EXAMPLES, TASKS, UNSEEN, file_of, judge, prompt

    tree, model = Tree.open(Registry(folder / "store"), "numbers"), load_base(folder / "base")
    judged = {}
    with tree.live(model) as live:  # from node to node, each exact to the bit
        for path in ("", *TASKS):
            live.checkout(path)
            judged[path or "(the base)"] = judge(model, folder)
    click.echo(f"\nLoss on the {len(UNSEEN)} numbers that none was trained on:\n")
    rows = [[name, *(f"{loss:.2f}" for loss in losses.values()), *texts] for name, (losses, texts) in judged.items()]
    header = ["NODE", *(f"{file_of(task).upper()}>" for task in TASKS), *(prompt(n).strip() for n in EXAMPLES)]
    click.echo(table(header, rows))
    return {name: losses for name, (losses, _) in judged.items()}


def _combine(folder: Path) -> None:
    """Take nodes out as plain adapters, combine them, say where the result came from, and make it again."""
    from loraforge_cli import demo_model as demo

    for task in demo.WEIGHTS:
        _loraforge(folder, "tree", "flatten", "numbers", task, "--as", f"{task}:v1")
    terms = [f"{task}:v1={weight}" for task, weight in demo.WEIGHTS.items()]
    _loraforge(folder, "compose", *terms, "--rank", str(demo.RANK), "--as", "french-law:v1")
    _loraforge(folder, "log", "french-law:v1")
    _loraforge(folder, "rebuild", "french-law:v1", "--verify")
    _loraforge(folder, "ls")
    for name in (*demo.WEIGHTS, "french-law"):
        _loraforge(folder, "pull", f"{name}:v1", "--to", f"./{name}")


def _merge_and_back(folder: Path) -> bool:
    """Write a grandchild's weights as a checkpoint, and take them out again."""
    _loraforge(folder, "tree", "merge", "numbers", "french/loud", "--out", "./loud")
    _loraforge(folder, "unmerge", "./loud", "--out", "./base-again")
    before, after = (hashlib.sha256((folder / name / "model.safetensors").read_bytes()).hexdigest()
                     for name in ("base", "base-again"))  # fmt: skip
    click.echo(f"sha256 of base and of base-again: {before[:16]} and {after[:16]}")
    return before == after


def _share(folder: Path) -> bool:
    """Push to another store, and pull from there, with all that it was made from."""
    team = folder / "team"
    team.mkdir()
    _loraforge(folder, "push", "french-law:v1", "--to", team.as_uri())
    _loraforge(folder, "push", "french-law:v1", "--to", team.as_uri())  # again: nothing is sent
    _loraforge(folder, "pull", f"{team.as_uri()}#french-law:v1", "--as", "from-the-team:v1")
    _loraforge(folder, "fsck")
    return True


def _loraforge(folder: Path, *arguments: str, into: str | None = None) -> None:
    """Run a command as a user would, and show it; ``into`` takes what it prints."""
    from loraforge_cli.main import cli

    shown = shlex.join(arguments).replace(f"file://{folder}", "file://$PWD")
    click.echo(f"\n$ loraforge {shown}{f' > {into}' if into else ''}")
    unseen = [] if sys.stderr.isatty() else ["--quiet"]  # a bar goes away again, lines of a log would stay
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed) if into else contextlib.nullcontext():
        cli.main([*arguments, "--store", str(folder / "store"), *unseen], standalone_mode=False)
    if into:
        (folder / into).write_text(printed.getvalue())


def _compare(folder: Path) -> dict[str, object]:
    """Check the claims: errors against float64, times, and what PEFT gives on the same input."""
    import loraforge as lf
    from loraforge_cli import demo_model as demo

    folders = {task: folder / task for task in demo.WEIGHTS}
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
