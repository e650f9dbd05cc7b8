"""All fuzz targets, one process for each processor, with a seed: what ``make torture`` runs.

    python -m tests.fuzz.torture [--seed N] [--runs N] [--keep DIRECTORY] [TARGET ...]

Prints a line of JSON a target: how many executions, and what became of them. Where atheris is not installed it says so.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.fuzz.seeds import read_seeds
from tests.fuzz.targets import TARGETS

RUNS = 10_000_000
Found = dict[str, object]


def fuzz(name: str, runs: int, seed: int, corpus: Path) -> Found:
    """Run one target from its seeds; ``corpus`` keeps what it finds."""
    for number, data in enumerate(read_seeds(name)):
        (corpus / f"seed-{number}").write_bytes(data)
    counts, began = corpus.with_suffix(".json"), time.monotonic()
    options = [f"-atheris_runs={runs}", f"-seed={seed}", f"-artifact_prefix={corpus}-", str(corpus)]
    ran = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.run", name, "--counts", str(counts), *options],
        capture_output=True, text=True, errors="replace", check=False,
    )  # fmt: skip
    found: Found = json.loads(counts.read_text()) if counts.exists() else {"target": name, "executions": 0}
    said = [line for line in ran.stderr.splitlines() if not line.startswith(("#", "INFO", "WARNING"))]
    wrong = [] if ran.returncode == 0 else ["\n".join(said[-30:])]
    return {**found, "seconds": round(time.monotonic() - began, 1), "seed": seed, "wrong": wrong}


def main() -> int:
    """Run targets, print a line of JSON for each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("targets", nargs="*", default=[*TARGETS])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--keep", type=Path, help="a directory for what is found; else it is forgotten")
    options = parser.parse_args()
    if importlib.util.find_spec("atheris") is None:
        sys.stdout.write("no fuzzing: atheris 3 cannot be installed here (see what pip said above)\n")
        return 0
    failed = False
    with tempfile.TemporaryDirectory() as passing, ThreadPoolExecutor(os.cpu_count()) as pool:
        root = options.keep or Path(passing)
        for name in options.targets:
            (root / name).mkdir(parents=True, exist_ok=True)
        for found in pool.map(lambda n: fuzz(n, options.runs, options.seed, root / n), options.targets):
            sys.stdout.write(json.dumps(found) + "\n")
            sys.stdout.flush()
            failed = failed or bool(found["wrong"])
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
