"""``loraforge pull``: from a remote into the store, and out of the store as a plain directory."""

import click

from loraforge_cli.describe import describe
from loraforge_cli.options import SOURCE, Session, common, stored
from loraforge_cli.output import emit, note, one_line, size
from loraforge_cli.summary import line
from loraforge_cli.tree_view import is_tree, summary, view
from loraforge_registry.digest import Digest
from loraforge_registry.names import Reference, RefName
from loraforge_registry.paths import expand
from loraforge_registry.store import Store


@click.command("pull")
@click.argument("name", metavar="NAME|URL", type=SOURCE)
@click.option("--as", "new", metavar="NAME[:TAG]", help="What to call an adapter from a URL.")
@click.option("--to", "target", metavar="DIR", help="The directory to make.")
@click.option(
    "--with-lineage", "lineage", is_flag=True, help="Also what it was made from, as far as the remote has it."
)
@click.option("--force", is_flag=True, help="Move a tag that means another adapter.")
@common
def command(session: Session, *, name: str, new: str | None, target: str | None, lineage: bool, force: bool) -> None:
    """Write a stored adapter as a directory that PEFT loads; or get one from a remote. A tree is one for each path.

    URL is hf://ORG/REPO[@REVISION] or file:///DIR#NAME[:TAG]. Every byte is hashed, what a push would refuse is
    refused, and only what the store does not have is fetched. DIR must be new, empty, or hold this adapter already.
    """
    from loraforge_registry.remotes.address import is_url

    store = session.store()
    if target == "":
        raise click.UsageError("--to is empty; name a new directory")
    if is_url(name):
        ref, digest, got = _from_remote(session, store, name, new, lineage=lineage, force=force)
    elif new is not None or lineage or force:
        raise click.UsageError(f"--as, --with-lineage and --force go with a URL; {name} is in the store already")
    elif target is None:
        raise click.UsageError(f"where to? Write loraforge pull {name} --to DIR")
    else:
        ref, digest, got = None, stored(store, name), {}
    if target is not None:
        store.export(digest, expand(target))
    tree = view(store, digest, ref) if is_tree(store, digest) else None
    if session.as_json:
        found = describe(store, digest, ref).as_json() if tree is None else tree.as_json()
        emit({**found, **got, **({"directory": target} if target is not None else {})})
        return
    text = line(describe(store, digest, ref)) if tree is None else summary(tree)
    click.echo(f"{one_line(target)}  {text}" if target is not None else text)
    if got and not session.quiet:
        click.echo(f"{size(int(str(got['received'])))} fetched, {size(int(str(got['skipped'])))} here already")


def _from_remote(
    session: Session, store: Store, url: str, new: str | None, *, lineage: bool, force: bool
) -> tuple[RefName, Digest, dict[str, object]]:
    from loraforge_registry.remotes import open_remote, receive
    from loraforge_registry.remotes.directory import StoreRemote

    wanted = None if new is None else RefName.parse(new)
    with open_remote(url) as remote:
        tree = remote.tree() if isinstance(remote, StoreRemote) else None
        if tree is not None:
            return _tree(store, *tree, url, wanted, force=force)
        offer = remote.offer()
        ref = wanted or offer.name
        if ref is None:
            raise click.UsageError(f"{url}: under which name? Add --as NAME[:TAG]")
        before = store.lookup(ref)
        got = receive(store, remote, offer, ref, force=force, lineage=lineage, what=f"pull {offer.where}")
    for text in offer.notes:
        note(text, quiet=session.quiet)
    if before is not None and before != got.digest:
        note(f"{ref} moved from sha256:{before.short}", quiet=session.quiet)
    for parent in got.missing:
        hint = "which the remote does not have" if lineage else "which is not here: --with-lineage asks the remote"
        note(f"made from sha256:{parent.short}, {hint}", quiet=session.quiet)
    missing = [str(parent) for parent in got.missing]
    return (
        ref,
        got.digest,
        {
            "remote": offer.where,
            "received": got.received,
            "skipped": got.skipped,
            "missing": missing,
            "notes": list(offer.notes),
        },
    )


def _tree(
    store: Store, source: Store, digest: Digest, url: str, wanted: RefName | None, *, force: bool
) -> tuple[RefName, Digest, dict[str, object]]:
    from loraforge_registry.remotes.trees import copy_tree

    ref = wanted or Reference.parse(url.partition("#")[2]).ref
    if ref is None:
        raise click.UsageError(f"{url}: under which name? Add --as NAME[:TAG]")
    done = copy_tree(source, store, digest, ref, force=force, where=url)
    return ref, digest, {"remote": url, "received": done.sent, "skipped": done.skipped, "missing": [], "notes": []}
