"""Whatever operation on a tree is killed or refused at whatever call: the tree is the old one or the new one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.crash.store_derivations import TREES

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["grow", *TREES])
def test_a_tree_is_the_old_or_the_new_one(name):
    ran = subprocess.run(
        [sys.executable, "-m", "tests.crash.tree_operations", name],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (".", "registry", "cli"))},
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = json.loads(ran.stdout)
    assert not found["wrong"], "\n".join(found["wrong"][:20])
    assert found["injections"] > 10
