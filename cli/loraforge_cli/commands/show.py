"""``loraforge show``: everything about one adapter."""

from collections.abc import Mapping
from dataclasses import replace

import click

from loraforge_cli.describe import Described, describe
from loraforge_cli.lineage import names_by_digest, tree
from loraforge_cli.options import SOURCE, Session, common, refuse_url
from loraforge_cli.output import by_layer, count, emit, facts, size, spread, table
from loraforge_cli.tree_view import is_tree, show_tree
from loraforge_registry.ingest import examine, open_adapter
from loraforge_registry.names import Reference
from loraforge_registry.paths import expand, is_path
from loraforge_registry.spectrum import Spectrum


@click.command("show")
@click.argument("source", type=SOURCE)
@click.option("--all", "every", is_flag=True, help="One line a target, not one for all layers.")
@click.option("--spectrum", is_flag=True, help="The singular values of every update, too, and the ranks they come to.")
@common
def command(session: Session, *, source: str, every: bool, spectrum: bool) -> None:
    """Show rank, targets, base, errors, lineage, digests and size of an adapter, or a tree.

    SOURCE is a name or digest in the store, or a PEFT directory.
    """
    refuse_url(source)
    store = session.store()
    if is_path(source):
        with open_adapter(expand(source)) as incoming:
            described = Described(None, *examine(incoming))
    else:
        digest, ref = store.resolve(source), Reference.parse(source).ref
        if is_tree(store, digest):
            if spectrum:
                raise click.UsageError(f"{source} is a tree; name one of its nodes by digest, and see its spectrum")
            show_tree(session, store, digest, ref)
            return
        described = describe(store, digest, ref)
    if spectrum:
        from loraforge.compose import spectra
        from loraforge_cli.sources import open_source

        described = replace(described, spectra=spectra(open_source(session, source)))
    if session.as_json:
        emit(described.as_json())
        return
    click.echo(_facts(described))
    if described.manifest.derivation is not None:
        click.echo("\nLineage\n" + "\n".join(tree(store, described, names_by_digest(store))))
    click.echo("\n" + _targets(described, every=every))
    if described.spectra is not None:
        click.echo("\n" + _spectra(described.spectra, every=every))


def _facts(described: Described) -> str:
    manifest, report = described.manifest, described.manifest.report or {}
    settings = described.layout.settings
    error = report.get("error")
    revision = f" at {manifest.base_revision}" if manifest.base_revision else ""
    return facts(
        {
            "name": str(described.ref) if described.ref else None,
            "digest": None if described.digest is None else str(described.digest),
            "content id": str(manifest.content_id),
            "base": f"{manifest.base_name or 'not named'}{revision}",
            "rank": f"{spread(described.ranks)} on {len(described.ranks)} targets",
            "error": f"{error:.3g} of |dW|, from the re-rank" if isinstance(error, float) else None,
            "training": _training(report),
            "size": f"{count(manifest.parameters)} parameters, {size(manifest.size)}",
            "saved": ", ".join(described.layout.extras[:4]) + (" ..." if len(described.layout.extras) > 4 else ""),
            "bias": None if settings.bias == "none" else settings.bias,
        }
    )


def _training(report: Mapping[str, object]) -> str | None:
    """The loss that a trained adapter came to."""
    if "loss" not in report:
        return None
    judged = f", {report['eval_loss']:g} on the data set aside" if "eval_loss" in report else ""
    return f"loss {report['loss']:g} after {report['steps']} steps{judged}"


def _targets(described: Described, *, every: bool) -> str:
    targets, errors = described.layout.targets, described.errors
    groups = {name: [name] for name in targets} if every else by_layer(targets)
    header = ["TARGET", "N>", "KIND", "RANK>", "ALPHA>", "SHAPE>", *(["ERROR>"] if errors else [])]
    rows = []
    for label, names in groups.items():
        found = [targets[name] for name in names]
        shapes = sorted({"x".join(map(str, target.shape)) for target in found})
        row = [
            label,
            str(len(names)),
            found[0].kind,
            spread(target.rank for target in found),
            spread(target.alpha for target in found),
            shapes[0] if len(shapes) == 1 else "various",
        ]
        rows.append(row + ([spread(errors.get(name, 0.0) for name in names)] if errors else []))
    return table(header, rows)


def _spectra(spectra: Mapping[str, Spectrum], *, every: bool) -> str:
    """The norm of the updates, and how many directions they come to: stable and effective rank, and 99 % of |dW|^2."""
    groups = {name: [name] for name in spectra} if every else by_layer(spectra)
    rows = []
    for label, names in groups.items():
        found = [spectra[name] for name in names]
        numbers = (
            (s.norm for s in found),
            (s.largest for s in found),
            (s.stable_rank for s in found),
            (s.effective_rank for s in found),
            (s.rank_for(0.99) for s in found),
        )
        rows.append([label, str(len(names)), *map(spread, numbers)])
    return table(["TARGET", "N>", "|dW|>", "LARGEST>", "STABLE>", "EFFECTIVE>", "99 %>"], rows)
