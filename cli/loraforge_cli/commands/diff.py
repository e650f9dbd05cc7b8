"""``loraforge diff``: how two adapters differ."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

from loraforge_cli.options import SOURCE, Session, common, refuse_url
from loraforge_cli.output import by_layer, count, emit, spread, table

if TYPE_CHECKING:
    from loraforge.adapter import Adapter
    from loraforge.compose import Difference


@click.command("diff")
@click.argument("before", type=SOURCE)
@click.argument("after", type=SOURCE)
@click.option("--all", "every", is_flag=True, help="One line a target, not one for all layers.")
@common
def command(session: Session, *, before: str, after: str, every: bool) -> None:
    """Show how adapter AFTER differs from BEFORE: settings, tensors, and the updates themselves.

    |dW| is the norm of a target's update; DIFF that of the difference, relative to the larger. It is computed from
    the factors, so another rank, scale or basis of the same update is no difference.
    """
    refuse_url(before)
    refuse_url(after)
    from loraforge.compose import compare, overall
    from loraforge_cli.sources import open_source

    first, second = open_source(session, before), open_source(session, after)
    rows = compare(first, second)
    settings, tensors = _settings(first, second), _tensors(first, second)
    total, outside = overall(rows), _outside(first, second)
    if session.as_json:
        targets = {
            row.target: {"norm_before": row.norm_before, "norm_after": row.norm_after, "relative": row.relative}
            for row in rows
        }
        emit(
            {
                "difference": total,
                "settings": settings,
                "tensors": tensors,
                "targets": targets,
                "beside_updates": outside,
            }
        )
        return
    _print_settings(settings)
    click.echo(
        f"tensors: {tensors['equal']} equal, {tensors['changed']} changed, "
        f"{tensors['removed']} removed, {tensors['added']} added"
    )
    if outside:
        click.echo(f"beside the updates: {', '.join(outside[:3])}{' ...' if len(outside) > 3 else ''} differ")
    click.echo(f"updates: differ by {total:.3g} of |dW|\n")
    click.echo(table_of(rows, every=every))


def _print_settings(settings: dict[str, list[object]]) -> None:
    if settings:
        rows = [[key, _value(old), _value(new)] for key, (old, new) in settings.items()]
        click.echo(table(["SETTING", "BEFORE", "AFTER"], rows) + "\n")


def _value(value: object) -> str:
    text = "-" if value in (None, [], "") else str(value)
    return text if len(text) <= 30 else f"{text[:29]}…"


def _settings(first: "Adapter", second: "Adapter") -> dict[str, list[object]]:
    """The settings that differ, with both values; ranks and scales as a summary."""
    before, after = _summary(first), _summary(second)
    return {key: [before[key], after[key]] for key in before if before[key] != after[key]}


def _summary(adapter: "Adapter") -> dict[str, object]:
    pairs, settings = adapter.targets.values(), adapter.settings
    return {
        "base": settings.base_name,
        "revision": settings.base_revision,
        "task": settings.task_type,
        "saved": list(settings.modules_to_save),
        "tokens": {module: list(rows) for module, rows in settings.token_indices.items()},
        "bias": settings.bias,
        "fan_in_fan_out": settings.fan_in_fan_out,
        "weight_tying": settings.weight_tying,
        "base_mutating_init": settings.base_mutating_init,
        "targets": len(adapter.targets),
        "rank": spread(pair.rank for pair in pairs),
        "scale": spread(pair.scale for pair in pairs),
        "parameters": count(adapter.parameters),
        "dora": any(pair.magnitude is not None for pair in pairs),
    }


def _tensors(first: "Adapter", second: "Adapter") -> dict[str, int]:
    """How many tensors are equal bit for bit, changed, removed, added."""
    from loraforge.adapter import named_tensors, same_tensor

    before, after = named_tensors(first), named_tensors(second)
    both = before.keys() & after.keys()
    equal = sum(same_tensor(before[key], after[key]) for key in both)
    return {
        "equal": equal,
        "changed": len(both) - equal,
        "removed": len(before.keys() - after.keys()),
        "added": len(after.keys() - before.keys()),
    }


def _outside(first: "Adapter", second: "Adapter") -> list[str]:
    """The keys of what differs and is no factor: biases, magnitudes, whole saved tensors."""
    from loraforge.adapter import named_tensors, same_tensor

    before, after = named_tensors(first), named_tensors(second)
    factors = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B")
    keys = sorted(key for key in before.keys() | after.keys() if not key.endswith(factors))
    return [key for key in keys if not same_tensor(before.get(key), after.get(key))]


def table_of(rows: "list[Difference]", *, every: bool) -> str:
    """Return the differences of updates, one line for all layers of a kind, or for each."""
    found = {row.target: row for row in rows}
    groups = {name: [name] for name in found} if every else by_layer(found)
    lines = []
    for label, names in groups.items():
        group = [found[name] for name in names]
        relative = [row.relative for row in group if row.relative is not None]
        lines.append(
            [
                label,
                str(len(names)),
                _norms(row.norm_before for row in group),
                _norms(row.norm_after for row in group),
                spread(relative) if len(relative) == len(group) else "shapes",
            ]
        )
    return table(["TARGET", "N>", "|dW| BEFORE>", "|dW| AFTER>", "DIFF>"], lines)


def _norms(norms: Iterable[float | None]) -> str:
    known = [norm for norm in norms if norm is not None]
    return spread(known) if known else "-"
