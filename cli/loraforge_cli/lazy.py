"""A group of commands that are imported when they run: --help reads a table."""

import importlib
from collections.abc import Mapping
from typing import Any

import click

Table = Mapping[str, tuple[str, str]]
"""name: (module, summary)."""


class Commands(click.Group):
    """A group whose commands are modules of ``package``, each with an attribute ``command``."""

    def __init__(self, *args: Any, table: Table, package: str, **options: Any) -> None:  # noqa: ANN401 - click's
        super().__init__(*args, **options)
        self._table, self._package = table, package

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """Return the names in the order of the table."""
        return list(self._table)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - as above
        """Import one command."""
        if cmd_name not in self._table:
            return None
        command: click.Command = importlib.import_module(f"{self._package}.{self._table[cmd_name][0]}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002 - as above
        """Write the help from the table."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in self._table.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Say which command may have been meant."""
        if args[0] not in self._table and not args[0].startswith("-"):
            import difflib

            near = difflib.get_close_matches(args[0], self._table, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise click.UsageError(f"there is no command {args[0]!r}{hint}", ctx)
        return super().resolve_command(ctx, args)
