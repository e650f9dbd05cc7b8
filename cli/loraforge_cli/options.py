"""What every command takes, and what a source is."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
from click.shell_completion import CompletionItem

from loraforge_registry.digest import Digest
from loraforge_registry.errors import LoraforgeError
from loraforge_registry.paths import is_path
from loraforge_registry.store import Store


@dataclass(frozen=True)
class Session:
    """The global options of one run."""

    store_path: str | None
    as_json: bool
    quiet: bool

    def store(self) -> Store:
        """Open the store."""
        return Store(self.store_path)


class SourceType(click.ParamType[str]):
    """A path or a reference; completes names from the store, then files."""

    name = "source"

    def shell_complete(
        self,
        ctx: click.Context,
        param: click.Parameter,  # noqa: ARG002 - click's signature
        incomplete: str,
    ) -> list[CompletionItem]:
        """Offer the store's names, and let the shell add paths."""
        try:
            names = [str(line.ref) for line in Store((ctx.find_root().params or {}).get("store")).ls()]
        except (LoraforgeError, OSError):
            names = []
        found = [CompletionItem(name) for name in names if name.startswith(incomplete)]
        return found or [CompletionItem(incomplete, type="file")]


SOURCE = SourceType()


def common(function: Callable[..., object]) -> Callable[..., object]:
    """Let --store, --json and -q stand behind the command, too, and pass a ``Session``."""
    import functools

    @functools.wraps(function)
    def run(*, store: str | None, as_json: bool, quiet: bool, **arguments: object) -> object:
        given = click.get_current_context().obj or {}
        session = Session(
            store_path=store or given.get("store"),
            as_json=as_json or bool(given.get("as_json")),
            quiet=quiet or bool(given.get("quiet")),
        )
        return function(session, **arguments)

    for option in (
        click.option("--store", metavar="DIR", help="The store to use."),
        click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout, nothing else."),
        click.option("-q", "--quiet", is_flag=True, help="Print only what was asked for."),
    ):
        run = option(run)
    return run


def stored(store: Store, source: str) -> Digest:
    """Return the artifact in the store that a reference means; a path means none."""
    if is_path(source):
        raise click.UsageError(
            f"{source} is a path; this takes an adapter in the store (loraforge push {source} first)"
        )
    return store.resolve(source)


def refuse_url(text: str) -> None:
    """Refuse a URL where only what is here will do."""
    if "://" in text:
        raise click.UsageError(f"{text}: a URL; name a directory or an adapter in the store (loraforge pull URL first)")


def is_recipe(text: str) -> bool:
    """Whether a source is a recipe: a file of that kind, by its name."""
    return text.endswith((".yaml", ".yml"))


def weighted(text: str) -> tuple[str, float]:
    """Read SOURCE[=WEIGHT]; a path may hold an equals sign of its own."""
    refuse_url(text)
    if is_recipe(text):
        raise click.UsageError(f"{text}: a recipe stands alone; what it combines, and how, it says itself")
    source, equals, weight = text.rpartition("=")
    if not equals or (is_path(text) and Path(text).exists()):
        with contextlib.suppress(ValueError):
            float(text)
            raise click.UsageError(f"{text!r} stands alone; write SOURCE=WEIGHT, without spaces")
        return text, 1.0
    try:
        return source, float(weight)
    except ValueError:
        raise click.UsageError(f"{text}: {weight!r} is not a weight; expected SOURCE=NUMBER") from None
