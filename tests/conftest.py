"""What every test gets: no way to the user's own store, hypothesis without a clock, and commands in this process."""

import json
import sys
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, settings

from loraforge_cli.main import main
from tests import canary
from tests.canary import no_token_gets_out, pytest_runtest_logreport  # noqa: F401 - pytest finds them here

settings.register_profile(
    "loraforge",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("loraforge")


@pytest.fixture(autouse=True)
def _own_store(tmp_path, monkeypatch):
    monkeypatch.setenv("LORAFORGE_STORE", str(tmp_path / "default-store"))


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
        if arguments[:3] != ("serve", "user", "add"):
            canary.look(f"loraforge {arguments[0]}", printed.out, printed.err)
        return Ran(stop.value.code or 0, printed.out, printed.err)

    return run_it
