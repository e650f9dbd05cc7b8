"""``loraforge``: the table of commands, and where an error becomes one line and an exit code."""

import errno
import json
import os
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import NoReturn

import click

from loraforge_cli.lazy import Commands
from loraforge_cli.output import one_line
from loraforge_registry.errors import LoraforgeError

# name: (module, summary). --help reads this table and imports no command.
COMMANDS: Mapping[str, tuple[str, str]] = {
    "push": ("push", "Store an adapter, and name it; --to a remote."),
    "pull": ("pull", "An adapter from a remote, or out of the store as a directory."),
    "search": ("search", "Find adapters by name, here or on the Hub."),
    "ls": ("ls", "List names, with what they mean."),
    "show": ("show", "Everything about one adapter."),
    "log": ("log", "Where an adapter came from."),
    "diff": ("diff", "How two adapters differ, by what they compute."),
    "tag": ("tag", "Give an adapter another name."),
    "rm": ("rm", "Take a name away."),
    "du": ("du", "How much the store holds, and how much of it is needed."),
    "export": ("export", "Write adapters and their lineage as one file."),
    "import": ("import_", "Store what export wrote."),
    "gc": ("gc", "Take away what no name or lineage needs."),
    "fsck": ("fsck", "Is the store whole? Say what is not, and repair it."),
    "compose": ("compose", "Combine adapters into one, exactly."),
    "rebuild": ("rebuild", "Derive an adapter again: is it the same?"),
    "explain": ("explain", "As what combination of others can an adapter be written?"),
    "rerank": ("rerank", "Shrink an adapter to a lower rank, with its error."),
    "train": ("train", "Train an adapter for a base."),
    "tree": ("tree", "Adapters grown on adapters: one base, many branches."),
    "merge": ("merge", "Write adapters into a base checkpoint."),
    "unmerge": ("unmerge", "Take them out again, bit for bit."),
    "verify": ("verify", "Is a merged checkpoint what its receipt says?"),
    "extract": ("extract", "A LoRA out of a full fine-tune."),
    "serve": ("serve", "A hub over the store, for the Hub's clients and browsers."),
    "demo": ("demo", "See it all work, offline, in a minute."),
}

EXIT_CODES: Mapping[str, int] = {
    "bad_format": 2,
    "bad_reference": 2,
    "cannot_adapt": 2,
    "cannot_compose": 2,
    "cannot_train": 2,
    "not_finite": 2,
    "usage": 2,
    "not_found": 3,
    "conflict": 4,
    "io": 5,
    "bad_store": 5,
    "remote": 5,
}


@click.command(
    cls=Commands,
    table=COMMANDS,
    package="loraforge_cli.commands",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option("--store", metavar="DIR", help="The store (LORAFORGE_STORE, else the platform's data directory).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout, nothing else.")
@click.option("-q", "--quiet", is_flag=True, help="Print only what was asked for.")
@click.version_option(package_name="loraforge", message="loraforge %(version)s")
@click.pass_context
def cli(ctx: click.Context, store: str | None, *, as_json: bool, quiet: bool) -> None:
    """Git and docker for LoRA adapters, with exact linear algebra.

    SOURCE is a PEFT directory or file (it contains a / or exists), NAME[:TAG], NAME@sha256:HEX, or sha256:HEX.
    """
    ctx.obj = {"store": store, "as_json": as_json, "quiet": quiet}


def main() -> NoReturn:
    """Run the command line and exit."""
    _heed_signals()
    code: object = 0
    try:
        code = cli.main(standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.exceptions.NoArgsIsHelpError as help_page:
        click.echo(help_page.format_message())
    except click.Abort:
        _fail("interrupted", "interrupted", 130)
    except click.ClickException as error:
        _fail("usage", _usage(error), 2)
    except LoraforgeError as error:
        _fail(error.kind, _text(error), EXIT_CODES[error.kind])
    except BrokenPipeError:
        # the reader (head, less) has gone: no error, and nothing more to flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        _fail("io", f"{error.filename or ''}: {error.strerror or error}".removeprefix(": "), 5)
    except MemoryError:
        _fail("memory", "out of memory", 5)
    except ModuleNotFoundError as error:
        _fail("missing_extra", f"{error.name} is not installed", 2)
    sys.exit(code if isinstance(code, int) else 0)


def _heed_signals() -> None:
    for number in (signal.SIGTERM, signal.SIGHUP):
        # what somebody ignores stays ignored (nohup); outside the main thread the program around us decides
        if signal.getsignal(number) is signal.SIG_DFL:
            with suppress(ValueError):
                signal.signal(number, _stop)


def _stop(number: int, _frame: object) -> NoReturn:
    """Leave as at Ctrl-C: what was begun is taken back on the way out. A second signal does not wait for that."""
    signal.signal(number, signal.SIG_DFL)
    sys.exit(128 + number)


def _fail(kind: str, message: str, code: int) -> NoReturn:
    message = one_line(message)
    if "--json" in sys.argv[1:]:
        click.echo(json.dumps({"error": {"kind": kind, "message": message}}))
    else:
        click.echo(f"loraforge: {message}", err=True)
    sys.exit(code)


def _usage(error: click.ClickException) -> str:
    """The sentence of a wrong command line, with where to look where it does not say so itself."""
    message = error.format_message()
    where = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else ""
    return f"{message.rstrip('.')} (see {where} --help)" if message.endswith(".") and where else message


def _text(error: LoraforgeError) -> str:
    """The sentence; an OSError's str() would put its number in front."""
    said = str(error.args[-1]) if error.args else error.kind
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return f"{said}: make room (in a store: loraforge gc --yes --now)" if full else said
