"""The short form of ``make torture``: the same harnesses on a sample, in a process whose forks are quick."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("section", ["faults", "pairs", "calls", "power", "mutants", "storm", "bits", "index"])
def test_nothing_is_lost(section):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (".", "registry", "cli"))}
    ran = subprocess.run(
        [sys.executable, "-m", "tests.crash.store_torture", "--short", section],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = json.loads(ran.stdout)
    assert found["violations"] == 0, found["wrong"]
    least = {
        "faults": ("injections", 100),
        "pairs": ("pairs", 30),
        "calls": ("commands compared", 0),  # none without strace
        "power": ("disks", 1000),
        "mutants": ("caught", 25),
        "storm": ("published", 20),
        "bits": ("bits of metadata", 50),
        "index": ("calls of the cache", 0),  # none without strace
    }
    figure, number = least[section]
    assert found[figure] >= number, found
