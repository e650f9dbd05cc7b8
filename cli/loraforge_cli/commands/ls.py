"""``loraforge ls``: names and what they mean."""

import click

from loraforge_cli.options import Session, common
from loraforge_cli.output import count, emit, note, size, table
from loraforge_registry.errors import NotFoundError
from loraforge_registry.names import RefName
from loraforge_registry.store import Named


@click.command("ls")
@click.argument("name", required=False)
@common
def command(session: Session, *, name: str | None) -> None:
    """List names, or the tags of one NAME, with what they mean."""
    store = session.store()
    lines = store.ls(None if name is None else RefName.parse(name).name)
    if name is not None and ":" in name:
        lines = [line for line in lines if str(line.ref) == name]
    if name is not None and not lines:
        raise NotFoundError(f"there is no {name} in {store.path}")
    if session.as_json:
        emit([_as_json(line) for line in lines])
        return
    if not lines:
        note("nothing here yet: loraforge push ./adapter NAME:TAG", quiet=session.quiet)
        return
    header = ["NAME", "DIGEST", "RANK>", "PARAMS>", "SIZE>", "MADE BY", "BASE"]
    click.echo(table(header, [_row(line) for line in lines]))


def _row(line: Named) -> list[str]:
    digest = "" if line.digest is None else line.digest.short
    if line.summary is None:
        return [str(line.ref), digest, "", "", "", "DAMAGED", line.problem or ""]
    s = line.summary
    made = s.operation or "import"
    return [str(line.ref), digest, str(s.rank), count(s.parameters), size(s.size), made, s.base or ""]


def _as_json(line: Named) -> dict[str, object]:
    summary = line.summary
    return {
        "name": line.ref.name,
        "tag": line.ref.tag,
        "digest": None if line.digest is None else str(line.digest),
        "content_id": None if summary is None else str(summary.content_id),
        "base": None if summary is None else {"name": summary.base},
        "rank": None if summary is None else summary.rank,
        "parameters": None if summary is None else summary.parameters,
        "size": None if summary is None else summary.size,
        "operation": None if summary is None else summary.operation,
        "problem": line.problem,
    }
