"""``loraforge extract``: a LoRA out of a full fine-tune."""

from typing import TYPE_CHECKING

import click

from loraforge_cli.options import Session, common, refuse_url
from loraforge_cli.output import by_layer, count, emit, size, spread, table
from loraforge_registry.names import RefName

if TYPE_CHECKING:
    from loraforge.checkpoint.extract import Extracted, ExtractReport
    from loraforge_cli.describe import Described


@click.command("extract")
@click.argument("base")
@click.argument("finetuned")
@click.option("--as", "name", metavar="NAME[:TAG]", help="What to call the result.")
@click.option("--rank", type=int, metavar="R", help="The rank of every target.")
@click.option("--energy", type=float, metavar="E", help="The share of every target's |D|^2 to hold.")
@click.option("--auto", is_flag=True, help="The rank that stands out of the rounding noise, for each target.")
@click.option("--max-rank", type=int, default=128, metavar="R", help="The greatest rank, with --energy or --auto.")
@click.option(
    "--save",
    multiple=True,
    metavar="auto|none|NAME",
    help="What else changed: keep it whole (auto), only these modules (a name or its end, repeatable), or none of it.",
)
@click.option("--drop", multiple=True, metavar="NAME", help="Leave a module or tensor out (its end; repeatable).")
@click.option("--base-name", metavar="NAME", help="What to call the base, if not as its config.json does.")
@click.option("--fan-in-fan-out/--no-fan-in-fan-out", default=None, help="Whether weights lie (in, out), as GPT-2's.")
@click.option("--force", is_flag=True, help="Move a tag that means another adapter.")
@click.option("--dry-run", is_flag=True, help="Say what would be made; store nothing.")
@common
def command(
    session: Session,
    *,
    base: str,
    finetuned: str,
    name: str | None,
    rank: int | None,
    energy: float | None,
    auto: bool,
    max_rank: int,
    save: tuple[str, ...],
    drop: tuple[str, ...],
    base_name: str | None,
    fan_in_fan_out: bool | None,
    force: bool,
    dry_run: bool,
) -> None:
    """Make a LoRA of the difference between two checkpoints, BASE and FINETUNED.

    Say exactly one of --rank, --energy and --auto. What changed and is no matrix of a linear layer (embeddings, output
    heads, norms, biases) needs --save or --drop. ERROR is |D - BA| / |D|; NOISE is the share of |D|^2 that rounding
    the fine-tune explains, which no adapter needs to hold.
    """
    refuse_url(base)
    refuse_url(finetuned)
    if name is None and not dry_run:
        raise click.UsageError("say what to call the result: --as NAME[:TAG] (or --dry-run)")
    ref = None if name is None else RefName.parse(name)
    from loraforge.checkpoint.extract import extract

    extracted = extract(
        base,
        finetuned,
        rank=rank,
        energy=energy,
        auto=auto,
        max_rank=max_rank,
        save="none" if save == ("none",) else "auto" if save == ("auto",) else save,
        drop=drop,
        base_name=base_name,
        fan_in_fan_out=fan_in_fan_out,
    )
    if dry_run or ref is None:
        _print_plan(session, extracted)
    else:
        _print_result(session, _store(session, extracted, ref, force=force), extracted.report)


def _store(session: Session, extracted: "Extracted", ref: RefName, *, force: bool) -> "Described":
    from loraforge.formats import peft
    from loraforge.registry import Registry
    from loraforge_cli.describe import describe

    store = Registry(session.store_path).store
    adapter, record = extracted.adapter, extracted.report.as_record()
    found = store.put(peft.encode(adapter), derivation=adapter.derivation, report=record, name=ref, force=force)
    return describe(store, found.digest, ref)


def _print_result(session: Session, described: "Described", report: "ExtractReport") -> None:
    from loraforge_cli.summary import line

    if session.as_json:
        emit(described.as_json())
        return
    click.echo(line(described))
    if not session.quiet:
        click.echo("\n" + _shares(report))


def _print_plan(session: Session, extracted: "Extracted") -> None:
    from loraforge.adapter import named_tensors

    adapter, report = extracted.adapter, extracted.report
    ranks = [pair.rank for pair in adapter.targets.values()]
    size_bytes = sum(tensor.numel() * tensor.itemsize for tensor in named_tensors(adapter).values())
    if session.as_json:
        emit(
            {
                "dry_run": True,
                "rank": max(ranks),
                "parameters": adapter.parameters,
                "size": size_bytes,
                "report": report.as_record(),
            }
        )
        return
    click.echo(
        f"would make: rank {spread(ranks)}, {len(ranks)} targets, {count(adapter.parameters)} parameters, "
        f"{size(size_bytes)}"
    )
    click.echo("\n" + _shares(report))


def _shares(report: "ExtractReport") -> str:
    """What is held of each target's change, one line for all layers of a kind; then what is held whole, or not at all.

    A left-out tensor has no share to add up: its change is given as a norm.
    """
    rows = []
    for label, names in by_layer(report.targets).items():
        found = [report.targets[name] for name in names]
        rows.append(
            [
                label,
                str(len(names)),
                spread(t.rank for t in found),
                spread(t.captured for t in found),
                spread(t.noise for t in found),
                spread(t.error for t in found),
            ]
        )
    shares = [f"{value:.3g}" for value in (report.captured, report.noise, report.error)]
    lines = [
        table(
            ["TARGET", "N>", "RANK>", "CAPTURED>", "NOISE>", "ERROR>"],
            [*rows, ["all", str(len(report.targets)), "", *shares]],
        )
    ]
    if report.saved:
        lines.append(
            table(["SAVED WHOLE", "N>"], [[label, str(len(n))] for label, n in by_layer(report.saved).items()])
        )
    if report.left_out:
        lines.append(_left_out(report))
    return "\n\n".join(lines)


def _left_out(report: "ExtractReport") -> str:
    rows = []
    for label, names in by_layer(report.left_out).items():
        norms = [norm for name in names if (norm := report.left_out[name]) is not None]
        rows.append([label, str(len(names)), spread(norms) if norms else "-"])
    return table(["LEFT OUT", "N>", "|CHANGE|>"], rows)
