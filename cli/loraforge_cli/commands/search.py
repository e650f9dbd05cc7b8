"""``loraforge search``: adapters by name, in the store or on the Hub."""

import click

from loraforge_cli.options import Session, common
from loraforge_cli.output import count, emit, note, table

LIMIT = 20


@click.command("search")
@click.argument("text")
@click.option("--on", "url", metavar="URL", help="hf://: ask the Hub. Without it, the names in the store.")
@click.option("--limit", type=click.IntRange(1, 100), default=LIMIT, show_default=True, help="At most so many.")
@common
def command(session: Session, *, text: str, url: str | None, limit: int) -> None:
    """Find adapters whose name contains TEXT."""
    rows = _here(session, text) if url is None else _on_hub(url, text, limit)
    if session.as_json:
        emit(rows[:limit])
        return
    if not rows:
        note(f"nothing called {text!r}" + ("; on the Hub: --on hf://" if url is None else ""), quiet=session.quiet)
        return
    if url is None:
        lines = [[str(row["name"]), str(row["base"] or "")] for row in rows[:limit]]
        click.echo(table(["NAME", "BASE"], lines))
        return
    lines = [[str(row["name"]), str(row["base"] or ""), count(int(str(row["downloads"])))] for row in rows]
    click.echo(table(["NAME", "BASE", "DOWNLOADS>"], lines))


def _here(session: Session, text: str) -> list[dict[str, object]]:
    lines = [line for line in session.store().ls() if text.lower() in line.ref.name]
    return [{"name": str(line.ref), "base": line.summary and line.summary.base} for line in lines]


def _on_hub(url: str, text: str, limit: int) -> list[dict[str, object]]:
    from loraforge_registry.remotes import search_hub
    from loraforge_registry.remotes.address import parse_endpoint

    parse_endpoint(url)
    found: list[dict[str, object]] = []
    for row in search_hub(text, limit=limit):
        tags = row.get("tags")
        told = [tag for tag in tags if isinstance(tag, str)] if isinstance(tags, list) else []
        base = next((tag.rpartition(":")[2] for tag in told if tag.startswith("base_model:")), None)
        downloads = row.get("downloads")
        number = downloads if isinstance(downloads, int) and downloads >= 0 else 0
        found.append({"name": f"hf://{row.get('id')}", "base": base, "downloads": number})
    return found
