"""``loraforge push``: a PEFT directory into the store, and on to a remote."""

import re

import click

from loraforge_cli.describe import describe
from loraforge_cli.options import SOURCE, Session, common, refuse_url
from loraforge_cli.output import emit, note, one_line, size
from loraforge_cli.summary import line
from loraforge_cli.tree_view import is_tree, lines, view
from loraforge_registry.digest import Digest
from loraforge_registry.errors import NotFoundError, ReferenceSyntaxError
from loraforge_registry.ingest import find_adapter, open_adapter
from loraforge_registry.names import Reference, RefName
from loraforge_registry.paths import expand, is_path
from loraforge_registry.store import Store


@click.command("push")
@click.argument("source", type=SOURCE)
@click.argument("name", metavar="[NAME[:TAG]]", required=False)
@click.option("--to", "url", metavar="URL", help="Push on: hf://ORG/REPO[@TAG], or file:///DIR[#NAME:TAG].")
@click.option("--private", is_flag=True, help="With --to hf://: a repository that is made is private.")
@click.option("--force", is_flag=True, help="Move a tag that means another adapter.")
@common
def command(session: Session, *, source: str, name: str | None, url: str | None, private: bool, force: bool) -> None:
    """Store an adapter, and name it NAME:TAG (tag: latest).

    SOURCE is a PEFT directory, or a safetensors file with its adapter_config.json beside it; both are kept byte for
    byte. Without NAME the directory's name is taken. The tag latest moves with every push; others stay.

    With --to it then goes to a remote, where only what is missing is sent: as one commit to the main branch of a
    repository on the Hub, where its tag, unless it is latest, becomes a tag; or with its lineage into another store.
    """
    refuse_url(source)
    if private and url is None:
        raise click.UsageError("--private goes with --to hf://ORG/REPO")
    _check_url(url)
    store = session.store()
    ref: RefName | None
    if url is not None and name is None and not is_path(source):
        digest, ref = _stored(store, source), Reference.parse(source).ref
    else:
        ref = _name(source) if name is None else RefName.parse(name)
        digest = _push(session, store, source, ref, force=force)
    sent: dict[str, object] = {}
    if url is not None:
        sent = _push_on(session, store, digest, ref, url, private=private, force=force)
    tree = view(store, digest, ref) if is_tree(store, digest) else None
    if session.as_json:
        emit({**(describe(store, digest, ref).as_json() if tree is None else tree.as_json()), **sent})
    else:
        click.echo(line(describe(store, digest, ref)) if tree is None else "\n".join(lines(tree)))
        if url is not None:
            said = f"{size(int(str(sent['sent'])))} sent, {size(int(str(sent['skipped'])))} there already"
            click.echo(f"{one_line(str(sent['remote']))}  {said}")


def _push(session: Session, store: Store, source: str, ref: RefName, *, force: bool) -> Digest:
    if not is_path(source):
        digest = _stored(store, source)
        store.tag(digest, ref, force=force, what="push")
        return digest
    path = expand(source)
    before = store.lookup(ref)
    with open_adapter(path) as incoming:
        digest = store.put(incoming, name=ref, force=force).digest
    if before is not None and before != digest:
        note(f"{ref} moved from sha256:{before.short}", quiet=session.quiet)
    left_out = find_adapter(path).left_out
    if left_out:
        note(f"left out (no part of an adapter): {', '.join(left_out[:8])}", quiet=session.quiet)
    return digest


def _push_on(
    session: Session, store: Store, digest: Digest, ref: RefName | None, url: str, *, private: bool, force: bool
) -> dict[str, object]:
    from loraforge_registry.remotes import open_remote

    with open_remote(url, private=private) as remote:
        done = remote.publish(store, digest, ref, force=force)
    for text in done.notes:
        note(text, quiet=session.quiet)
    return {"remote": done.where, "sent": done.sent, "skipped": done.skipped, "notes": list(done.notes)}


def _check_url(url: str | None) -> None:
    """A wrong URL is said before anything is stored."""
    if url is not None:
        from loraforge_registry.remotes.address import parse_address

        parse_address(url)


def _stored(store: Store, source: str) -> Digest:
    try:
        return store.resolve(source)
    except NotFoundError as error:
        raise NotFoundError(f"{source}: no such file or directory, and {error}") from error


def _name(source: str) -> RefName:
    """Make a name of a directory's."""
    path = expand(source).resolve()
    stem = path.name if path.is_dir() else path.parent.name
    try:
        return RefName(re.sub(r"[^a-z0-9._-]+", "-", stem.lower()))
    except ReferenceSyntaxError as error:
        raise click.UsageError(f"{stem!r} cannot be a name; give one: loraforge push {source} NAME[:TAG]") from error
