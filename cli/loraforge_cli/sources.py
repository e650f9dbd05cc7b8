"""Sources as adapters in memory: only commands that compute import this, and torch with it."""

from collections.abc import Mapping, Sequence

import click

from loraforge.adapter import Adapter, named_tensors
from loraforge.compose import Reranked, RerankReport, perform
from loraforge.formats import peft
from loraforge.registry import Registry
from loraforge_cli.describe import Described, describe
from loraforge_cli.options import Session
from loraforge_cli.output import by_layer, count, emit, size, spread, table
from loraforge_cli.summary import line
from loraforge_registry.canonical import Value
from loraforge_registry.digest import Digest
from loraforge_registry.manifest import Artifact
from loraforge_registry.names import RefName
from loraforge_registry.paths import is_path


def open_source(session: Session, source: str) -> Adapter:
    """Open a directory, or an adapter in the store."""
    return peft.load(source) if is_path(source) else Registry(session.store_path).load(source)


def combine(
    method: str, terms: Sequence[tuple[Adapter, float]], parameters: Mapping[str, Value], criteria: Mapping[str, Value]
) -> tuple[Adapter, RerankReport | None]:
    """Combine, and re-rank where a criterion is given; what is None was not."""
    made = perform(method, terms, {name: value for name, value in parameters.items() if value is not None})
    given = {name: value for name, value in criteria.items() if value is not None}
    if given:
        made = perform("rerank", [(made.adapter if isinstance(made, Reranked) else made, 1.0)], given)
    return (made.adapter, made.report) if isinstance(made, Reranked) else (made, None)


def store_result(
    session: Session, adapter: Adapter, sources: list[str], ref: RefName, report: RerankReport | None, *, force: bool
) -> Described:
    """Store a derived adapter, and the directories it was made from: a lineage that points at nothing is none."""
    registry = Registry(session.store_path)
    with registry.store.session():  # no collection between the sources, which have no name, and what needs them
        derivation = adapter.derivation and adapter.derivation.located(store_sources(registry, sources))
        record = None if report is None else report.as_record()
        found = registry.store.put(peft.encode(adapter), derivation=derivation, report=record, name=ref, force=force)
        return describe(registry.store, found.digest, ref)


def store_sources(registry: Registry, sources: Sequence[str]) -> dict[Digest, Artifact]:
    """Store those that are directories, and return their artifacts by what they compute."""
    stored: dict[Digest, Artifact] = {}
    for source in sources:
        if is_path(source):
            digest = registry.push(source)
            found = Artifact(digest, registry.store.manifest(digest).content_id)
            stored[found.content_id] = found
    return stored


def print_result(session: Session, described: Described, report: RerankReport | None) -> None:
    """Print what was made, and what the re-rank cost."""
    if session.as_json:
        emit(described.as_json())
        return
    click.echo(line(described))
    if report is not None and not session.quiet:
        click.echo("\n" + error_table(report))


def print_plan(session: Session, adapter: Adapter, report: RerankReport | None) -> None:
    """Print what would be made: ranks, size, error."""
    ranks = [pair.rank for pair in adapter.targets.values()]
    size_bytes = sum(tensor.numel() * tensor.itemsize for tensor in named_tensors(adapter).values())
    if session.as_json:
        record = None if report is None else report.as_record()
        emit(
            {
                "dry_run": True,
                "rank": max(ranks),
                "parameters": adapter.parameters,
                "size": size_bytes,
                "report": record,
            }
        )
        return
    click.echo(
        f"would make: rank {spread(ranks)}, {len(ranks)} targets, {count(adapter.parameters)} parameters, "
        f"{size(size_bytes)}"
    )
    if report is not None:
        click.echo("\n" + error_table(report))


def error_table(report: RerankReport) -> str:
    """The relative error by target, one line for all layers of a kind."""
    rows = []
    for label, names in by_layer(report.targets).items():
        found = [report.targets[name] for name in names]
        rows.append(
            [
                label,
                str(len(names)),
                f"{spread(t.rank_before for t in found)} -> {spread(t.rank for t in found)}",
                spread(t.error for t in found),
            ]
        )
    overall = ["all", str(len(report.targets)), "", f"{report.error:.3g}"]
    return table(["TARGET", "N>", "RANK", "ERROR>"], [*rows, overall])
