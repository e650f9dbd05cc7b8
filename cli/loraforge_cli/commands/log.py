"""``loraforge log``: lineage, or the history of a name."""

import datetime as dt

import click

from loraforge_cli.describe import describe
from loraforge_cli.lineage import names_by_digest, tree
from loraforge_cli.options import SOURCE, Session, common, stored
from loraforge_cli.output import emit, note, table
from loraforge_cli.tree_view import is_tree, show_tree
from loraforge_registry.names import Reference
from loraforge_registry.refs import Move
from loraforge_registry.store import Store


@click.command("log")
@click.argument("source", type=SOURCE)
@click.option("--reflog", is_flag=True, help="The history of the name instead: every move of its tags.")
@common
def command(session: Session, *, source: str, reflog: bool) -> None:
    """Show which adapters one was made from, how, and those in turn."""
    store = session.store()
    if reflog:
        show_moves(session, store.reflog(source.partition(":")[0]))
        return
    digest, ref = stored(store, source), Reference.parse(source).ref
    if is_tree(store, digest):
        show_tree(session, store, digest, ref)
        note(f"what was done to it: loraforge tree log {source}", quiet=session.quiet)
        return
    described = describe(store, digest, ref)
    if session.as_json:
        emit(_lineage(store, described.as_json()))
    else:
        click.echo("\n".join(tree(store, described, names_by_digest(store))))


def _lineage(store: Store, document: dict[str, object]) -> dict[str, object]:
    """Return the JSON of an artifact with that of every artifact in its lineage."""
    keys = ("digest", "content_id", "name", "tag", "derivation", "parents")
    found: dict[str, dict[str, object]] = {}
    todo = list(document["parents"]) if isinstance(document["parents"], list) else []
    while todo:
        digest = todo.pop()
        if digest not in found and store.has(store.resolve(digest)):
            parent = describe(store, store.resolve(digest)).as_json()
            found[digest] = {key: parent[key] for key in keys}
            todo += parent["parents"] if isinstance(parent["parents"], list) else []
    return {**{key: document[key] for key in keys}, "ancestors": found}


def show_moves(session: Session, moves: list[Move]) -> None:
    """Print moves of a name, the newest first."""
    moves.reverse()  # newest first
    if session.as_json:
        emit(
            [
                {"time": m.time, "tag": m.tag, "old": m.old and str(m.old), "new": m.new and str(m.new), "who": m.who,
                 "what": m.what} for m in moves
            ]
        )  # fmt: skip
        return
    rows = [
        [
            dt.datetime.fromtimestamp(move.time, dt.UTC).strftime("%Y-%m-%d %H:%M:%SZ"),
            move.tag,
            "-" if move.old is None else move.old.short,
            "-" if move.new is None else move.new.short,
            move.what,
            move.who,
        ]
        for move in moves
    ]
    click.echo(table(["WHEN", "TAG", "FROM", "TO", "WHAT", "WHO"], rows))
