"""``loraforge pull``: from a remote into the store, and out of the store as a plain directory."""

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import click

from loraforge_cli.describe import describe
from loraforge_cli.options import SOURCE, Session, common, stored
from loraforge_cli.output import emit, note, one_line, size
from loraforge_cli.summary import line
from loraforge_cli.tree_view import is_tree, summary, view
from loraforge_registry.digest import Digest
from loraforge_registry.errors import NotFoundError
from loraforge_registry.names import RefName
from loraforge_registry.paths import expand
from loraforge_registry.refs import Move
from loraforge_registry.store import Store

if TYPE_CHECKING:
    from loraforge_registry.remotes import Received

_LISTED = 5


@click.command("pull")
@click.argument("name", metavar="NAME|URL", type=SOURCE)
@click.option("--as", "new", metavar="NAME[:TAG]", help="What to call an adapter from a URL.")
@click.option("--to", "target", metavar="DIR", help="The directory to make.")
@click.option(
    "--with-lineage", "lineage", is_flag=True, help="Also what it was made from, as far as the remote has it."
)
@click.option("--node", metavar="PATH", help="Of a tree only this node, and those that it stands on.")
@click.option("--force", is_flag=True, help="Move a tag that means another adapter.")
@common
def command(
    session: Session,
    *,
    name: str,
    new: str | None,
    target: str | None,
    lineage: bool,
    node: str | None,
    force: bool,
) -> None:
    """Write a stored adapter as a directory that PEFT loads; or get one from a remote. A tree is one for each path.

    URL is hf://ORG/REPO[@REVISION] or file:///DIR#NAME[:TAG]. Every byte is hashed, what a push would refuse is
    refused, and only what the store does not have is fetched. DIR must be new, empty, or hold this adapter already.
    """
    from loraforge_registry.remotes.address import is_url

    store = session.store()
    if target == "":
        raise click.UsageError("--to is empty; name a new directory")
    if is_url(name):
        ref, digest, got = _from_remote(session, store, name, new, node=node, lineage=lineage, force=force)
    elif new is not None or lineage or force:
        raise click.UsageError(f"--as, --with-lineage and --force go with a URL; {name} is in the store already")
    elif target is None:
        raise click.UsageError(f"where to? Write loraforge pull {name} --to DIR")
    else:
        ref, digest, got = None, stored(store, name), {}
    tree = view(store, digest, ref) if is_tree(store, digest) else None
    if node is not None and tree is None:
        raise click.UsageError(f"--node is about a tree; {name} is an adapter")
    if target is not None:
        store.export(digest, expand(target), node=node)
    if session.as_json:
        found = describe(store, digest, ref).as_json() if tree is None else tree.as_json()
        emit({**found, **got, **({"directory": target} if target is not None else {})})
        return
    text = line(describe(store, digest, ref)) if tree is None else summary(tree)
    click.echo(f"{one_line(target)}  {text}" if target is not None else text)
    if got and not session.quiet:
        click.echo(f"{size(int(str(got['received'])))} fetched, {size(int(str(got['skipped'])))} here already")


def _from_remote(
    session: Session, store: Store, url: str, new: str | None, *, node: str | None, lineage: bool, force: bool
) -> tuple[RefName, Digest, dict[str, object]]:
    from loraforge_registry.remotes import OfferedTree, open_remote, receive, receive_tree

    wanted = None if new is None else RefName.parse(new)
    with open_remote(url) as remote:
        tree = remote.tree()
        if node is not None and tree is None:
            raise click.UsageError(f"--node is about a tree; {url} is an adapter")
        offer = remote.offer() if tree is None else tree
        ref = wanted or offer.name
        if ref is None:
            raise click.UsageError(f"{url}: under which name? Add --as NAME[:TAG]")
        before, what = store.lookup(ref), f"pull {offer.where}"
        elsewhere = _elsewhere(store, ref, offer.where)
        notes = []
        if isinstance(offer, OfferedTree):
            part = offer if node is None else offer.along(node)
            got = receive_tree(store, remote, part, ref, force=force, lineage=lineage, what=what)
        else:
            got = receive(store, remote, offer, ref, force=force, lineage=lineage, what=what)
            notes = list(offer.notes)
    if before not in (None, got.digest):
        notes += elsewhere
    _say(session, ref, before, got, notes, lineage=lineage)
    missing = [str(parent) for parent in got.missing]
    found = {"remote": offer.where, "received": got.received, "skipped": got.skipped}
    return ref, got.digest, {**found, "missing": missing, "notes": notes}


def _elsewhere(store: Store, ref: RefName, where: str) -> list[str]:
    """Say that what a name means came from another place than this: it may be by other people."""
    moves: list[Move] = []
    with suppress(NotFoundError):
        moves = store.reflog(ref.name)
    verb, _, before = next((move.what for move in reversed(moves) if move.tag == ref.tag), "").partition(" ")
    if verb != "pull" or _origin(before) == _origin(where):
        return []
    return [f"{ref} came from {one_line(_origin(before))}; this one comes from {one_line(_origin(where))}"]


def _origin(where: str) -> str:
    """A URL without the revision or the name behind it."""
    scheme, _, rest = where.partition("://")
    return f"{scheme}://{rest.partition('#')[0].partition('@')[0]}"


def _say(
    session: Session, ref: RefName, before: Digest | None, got: "Received", notes: Sequence[str], *, lineage: bool
) -> None:
    for text in notes:
        note(text, quiet=session.quiet)
    if before is not None and before != got.digest:
        note(f"{ref} moved from sha256:{before.short}", quiet=session.quiet)
    hint = "which the remote does not have" if lineage else "which is not here: --with-lineage asks the remote"
    for parent in got.missing[:_LISTED]:
        note(f"made from sha256:{parent.short}, {hint}", quiet=session.quiet)
    if len(got.missing) > _LISTED:
        note(f"and {len(got.missing) - _LISTED} more", quiet=session.quiet)
