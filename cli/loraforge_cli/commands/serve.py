"""``loraforge serve``: a hub over the store, for clients that know only the Hugging Face Hub, and for browsers."""

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import click

from loraforge_cli.options import Session, common
from loraforge_cli.output import emit, note, table
from loraforge_cli.spectra import ChildSpectra
from loraforge_registry.paths import default_store, expand

EXTRA = "serving needs the extra: pip install 'loraforge[server]'"
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class Bytes(click.ParamType[int]):
    """A size: 500MB, 2GB."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Read a number with a unit of thousands."""
        text = str(value).strip().upper()
        number = text.rstrip("KMGTB")
        unit = text[len(number) :]
        try:
            return int(float(number) * _UNITS[unit])
        except (ValueError, KeyError, OverflowError):
            self.fail(f"{value} is not a size; expected a number with KB, MB, GB or TB", param, ctx)


SIZE = Bytes()


@click.group("serve", invoke_without_command=True)
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to be reached at.")
@click.option("--port", type=click.IntRange(0, 65535), default=7860, show_default=True, help="The port; 0 takes any.")
@click.option("--public", is_flag=True, help="Let who has no token read what is not private, from other machines too.")
@click.option("--allow-host", "hosts", multiple=True, metavar="NAME", help="A name by which clients call this machine.")
@click.option("--public-url", metavar="URL", help="The URL that clients see, behind a proxy.")
@click.option("--max-file", type=SIZE, default="64GB", show_default=True, help="The largest file.")
@click.option("--quota", type=SIZE, help="The most that one namespace may hold.")
@click.option("--no-spectra", is_flag=True, help="Work out no spectra for the pages: they take a process with torch.")
@common
@click.pass_context
def command(
    ctx: click.Context,
    session: Session,
    *,
    host: str,
    port: int,
    public: bool,
    hosts: Sequence[str],
    public_url: str | None,
    max_file: int,
    quota: int | None,
    no_spectra: bool,
) -> None:
    """Serve the store to huggingface_hub, PEFT and transformers, and to browsers.

    Clients need nothing but HF_ENDPOINT=http://HOST:PORT and, to write, HF_TOKEN=(what user add printed).
    """
    ctx.obj = {"store": session.store_path, "as_json": session.as_json, "quiet": session.quiet}
    if ctx.invoked_subcommand is not None:
        return
    run = _server()
    store = _path(session)
    run.check_exposed(host, run.accounts_of(store))
    settings = run.Settings(
        anonymous=public or run.is_loopback(host),
        hosts=frozenset(name.lower() for name in (*hosts, *run.names_in(host, public_url))),
        public_url=None if public_url is None else public_url.rstrip("/"),
        max_file=max_file,
        quota=quota,
    )
    bound = run.listen(host, port)
    hub, pins = run.open_hub(store, settings, None if no_spectra else ChildSpectra(store))
    nobody = not run.accounts_of(store).tokens()
    shown = f"[{host}]" if ":" in host else host
    click.echo(f"serving {store} at http://{shown}:{bound.getsockname()[1]}")
    if nobody:
        note("nobody may write yet: loraforge serve user add NAME", quiet=session.quiet)
    run.serve(hub, pins, bound)


@command.group("user")
def user() -> None:
    """Who may write, and read what is private."""


@user.command("add")
@click.argument("name")
@click.option(
    "--scope", "scopes", multiple=True, metavar="WHAT:WHERE", help="read:NAMESPACE or write:NAMESPACE; * is all."
)
@common
def add(session: Session, *, name: str, scopes: Sequence[str]) -> None:
    """Give NAME a token, and show it: this once, it is kept nowhere.

    Without --scope it may write to the namespace NAME. A user may have several tokens.
    """
    token = _server().accounts_of(_path(session)).add(name, scopes)
    if session.as_json:
        emit({"user": name, "token": token})
    else:
        note(f"the token of {name}, shown this once (HF_TOKEN, or hf auth login):", quiet=session.quiet)
        click.echo(token)


@user.command("ls")
@common
def ls(session: Session) -> None:
    """List users and their tokens, by the ids that rm takes."""
    tokens = _server().accounts_of(_path(session)).tokens()
    if session.as_json:
        emit([{"user": t.user, "id": t.id, "scopes": list(t.scopes)} for t in tokens])
    elif tokens:
        click.echo(table(["USER", "ID", "SCOPES"], [[t.user, t.id, " ".join(t.scopes)] for t in tokens]))


@user.command("rm")
@click.argument("name")
@click.option("--id", "token_id", metavar="ID", help="Only this token.")
@common
def rm(session: Session, *, name: str, token_id: str | None) -> None:
    """Revoke NAME's tokens: from the next request on they are nobody's."""
    count = _server().accounts_of(_path(session)).remove(name, token_id)
    note(f"revoked {count}", quiet=session.quiet)


def _path(session: Session) -> Path:
    return default_store() if session.store_path is None else expand(session.store_path)


def _server() -> ModuleType:
    """The part that needs the extra; imported when it runs."""
    try:
        from loraforge_registry.server import run
    except ModuleNotFoundError as error:
        raise click.UsageError(EXTRA) from error
    return run
