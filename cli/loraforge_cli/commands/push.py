"""``loraforge push``: a PEFT directory into the store."""

import re

import click

from loraforge_cli.describe import describe
from loraforge_cli.options import SOURCE, Session, common, refuse_url
from loraforge_cli.output import emit, note
from loraforge_cli.summary import line
from loraforge_cli.tree_view import is_tree, print_tree, view
from loraforge_registry.digest import Digest
from loraforge_registry.errors import NotFoundError, ReferenceSyntaxError
from loraforge_registry.ingest import find_adapter, open_adapter
from loraforge_registry.names import RefName
from loraforge_registry.paths import expand, is_path
from loraforge_registry.store import Store


@click.command("push")
@click.argument("source", type=SOURCE)
@click.argument("name", metavar="[NAME[:TAG]]", required=False)
@click.option("--force", is_flag=True, help="Move a tag that means another adapter.")
@common
def command(session: Session, *, source: str, name: str | None, force: bool) -> None:
    """Store an adapter, and name it NAME:TAG (tag: latest).

    SOURCE is a PEFT directory, or a safetensors file with its adapter_config.json beside it; both are kept byte for
    byte. Without NAME the directory's name is taken. The tag latest moves with every push; others stay.
    """
    refuse_url(source)
    store = session.store()
    ref = _name(source) if name is None else RefName.parse(name)
    if not is_path(source):
        digest = _stored(store, source)
        store.tag(digest, ref, force=force, what="push")
    else:
        path = expand(source)
        before = store.lookup(ref)
        with open_adapter(path) as incoming:
            digest = store.put(incoming, name=ref, force=force).digest
        if before is not None and before != digest:
            note(f"{ref} moved from sha256:{before.short}", quiet=session.quiet)
        left_out = find_adapter(path).left_out
        if left_out:
            note(f"left out (no part of an adapter): {', '.join(left_out[:8])}", quiet=session.quiet)
    if is_tree(store, digest):
        print_tree(session, view(store, digest, ref))
        return
    described = describe(store, digest, ref)
    if session.as_json:
        emit(described.as_json())
    else:
        click.echo(line(described))


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
