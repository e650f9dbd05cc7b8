import json
import sys
from dataclasses import dataclass

import pytest

from loraforge_cli.main import main


@dataclass(frozen=True)
class Ran:
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command line in this process, exactly as the console script does."""

    def run_it(*arguments):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["loraforge", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        printed = capsys.readouterr()
        return Ran(stop.value.code or 0, printed.out, printed.err)

    return run_it
