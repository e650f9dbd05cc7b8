"""``loraforge fsck``: is the store what it should be?"""

from pathlib import Path
from urllib.parse import unquote, urlsplit

import click

from loraforge_cli.options import Session, common
from loraforge_cli.output import emit, many, note, one_line
from loraforge_registry.check import Problem, Report


@click.command("fsck")
@click.option("--deep", is_flag=True, help="Read and hash every byte, and compare every manifest with its files.")
@click.option("--repair", "repairing", is_flag=True, help="Put right what can be.")
@click.option("--from", "url", metavar="URL", help="With --repair: a store that may have the bytes (file:///DIR).")
@common
def command(session: Session, *, deep: bool, repairing: bool, url: str | None) -> None:
    """Check the store, and say what is wrong, by name.

    Exits with 1 where something is damaged. A repair takes bytes from the trash or from the store at URL, by digest,
    and keeps what it replaces in quarantine/; it deletes nothing.
    """
    if url is not None and not repairing:
        raise click.UsageError("--from goes with --repair")
    source = None if url is None else _path_of(url)
    store = session.store()
    report = store.fsck(deep=deep)
    repaired: list[str] = []
    if repairing:
        repaired = store.repair(report, source)
        report = store.fsck(deep=deep)
    if session.as_json:
        emit(_as_json(report, repaired))
    else:
        _show(session, report, repaired)
        if not report.holds:
            note(_way_out(repairing=repairing, url=url), quiet=session.quiet)
    if not report.holds:
        raise click.exceptions.Exit(1)


def _path_of(url: str) -> Path:
    parts = urlsplit(url)
    if parts.scheme != "file" or parts.netloc not in ("", "localhost") or not parts.path:
        raise click.UsageError(f"{url}: this version repairs from another store on this machine: file:///DIR")
    return Path(unquote(parts.path))


def _show(session: Session, report: Report, repaired: list[str]) -> None:
    for place in repaired:
        click.echo(f"repaired  {one_line(place)}")
    damage = [problem for problem in report.problems if problem.is_damage]
    for problem in damage:
        click.echo(f"{problem.kind}  {one_line(problem.place)}: {one_line(problem.said)}")
    for problem in report.problems:
        if not problem.is_damage:
            note(f"{problem.kind}  {problem.place}: {problem.said}", quiet=session.quiet)
    said = f"{many(len(damage), 'place')} damaged" if damage else "whole"
    there = (many(report.artifacts, "artifact"), many(report.blobs, "file"), many(report.refs, "name"))
    click.echo(f"{', '.join(there)}: {said}")


def _way_out(*, repairing: bool, url: str | None) -> str:
    if not repairing:
        return "loraforge fsck --repair mends what the trash has; with --from file:///DIR also what another store has"
    if url is None:
        return "the trash does not have the rest: --from file:///DIR takes it from another store"
    return f"{url} does not have the rest: take it from another store, or remove the names (loraforge rm)"


def _as_json(report: Report, repaired: list[str]) -> dict[str, object]:
    return {
        "holds": report.holds,
        "artifacts": report.artifacts,
        "files": report.blobs,
        "names": report.refs,
        "repaired": repaired,
        "problems": [_problem(problem) for problem in report.problems],
    }


def _problem(problem: Problem) -> dict[str, object]:
    return {
        "kind": problem.kind,
        "damage": problem.is_damage,
        "place": problem.place,
        "said": problem.said,
        "digest": None if problem.digest is None else str(problem.digest),
        "name": None if problem.ref is None else str(problem.ref),
    }
