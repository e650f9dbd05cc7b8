"""How soon does the command line answer, and how does ``ls`` grow with the store?

``loraforge --help`` and ``loraforge ls`` of an empty store, against starting Python with the two libraries that they
cannot do without (``python -c "import click, msgpack"``); then ``ls`` of 10,000 artifacts, with the index that pushes
leave and after ``index.sqlite`` was deleted. The store is made through ``Store.put`` with fsync switched off in the
process that makes it: at the 12 fsyncs of a push the disk would take minutes.

The environment variable ARTIFACTS sets another number than 10,000.

To reach: below 3 times the start of Python; below 0.5 s for 10,000 artifacts.
"""

import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from unittest import mock

from loraforge_registry.header import encode_header, parse_header
from loraforge_registry.ingest import Incoming
from loraforge_registry.names import RefName
from loraforge_registry.store import Store

ARTIFACTS = int(os.environ.get("ARTIFACTS", "10000"))
COMMAND = str(Path(sysconfig.get_path("scripts")) / "loraforge")
TENSORS = [("A", (4, 64)), ("B", (64, 4))]
CONFIG = {"base_model_name_or_path": "acme/base", "peft_type": "LORA", "r": 4, "lora_alpha": 8}


def main() -> int:
    """Print the table; return 1 if ``ls`` does not show every artifact, or another with the index than without."""
    with tempfile.TemporaryDirectory() as folder:
        empty, full = Path(folder) / "empty", Path(folder) / "full"
        empty.mkdir()
        python = [sys.executable, "-c", "import click, msgpack"]
        small = _in_turns(
            {
                "python, click, msgpack": partial(_run, python),
                "--help": partial(_run, [COMMAND, "--help"]),
                "ls, empty": partial(_run, [COMMAND, "--store", str(empty), "ls"]),
            },
            rounds=21,
        )
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            pool.submit(fill, full, ARTIFACTS).result()
        listing = [COMMAND, "--store", str(full), "ls"]
        large = _in_turns({f"ls, {ARTIFACTS}": partial(_run, listing)}, rounds=7)
        large |= _in_turns({f"ls, {ARTIFACTS}, no index": partial(_run_without_index, full, listing)}, rounds=3)
        right = is_right(full, listing)
    start = small["python, click, msgpack"]
    print(f"{'':26}{'ms':>8}{'of Python':>11}")
    for name, seconds in {**small, **large}.items():
        print(f"{name:26}{seconds * 1e3:8.0f}{seconds / start:11.2f}")
    return 0 if right else 1


def fill(path: Path, count: int) -> None:
    """Push adapters that all differ, without waiting for the disk."""
    store = Store(path)
    tensors = [(f"base_model.model.layer.lora_{letter}.weight", "F32", shape) for letter, shape in TENSORS]
    start, body = encode_header(tensors), os.urandom(2 * 4 * 64 * 4)
    header = parse_header(start[8:], len(start) + len(body))
    with mock.patch("os.fsync"), mock.patch("os.fdatasync"):
        for number in range(count):
            config = json.dumps({**CONFIG, "target_modules": ["layer"]}).encode()
            chunks = [start, number.to_bytes(4, "little") + body[4:]]
            store.put(Incoming(config, header, chunks), name=RefName(f"adapter-{number // 10}", f"v{number % 10}"))


def is_right(store: Path, listing: Sequence[str]) -> bool:
    """Whether ``ls`` says the same of every artifact with the index as without."""
    command = [*listing, "--json"]
    with_index = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    (store / "index.sqlite").unlink()
    without = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    complete = len(with_index) == ARTIFACTS and all(line["rank"] == 4 for line in with_index)
    return complete and with_index == without


def _in_turns(jobs: dict[str, Callable[[], float]], *, rounds: int) -> dict[str, float]:
    """Return median times; the jobs take turns, so that a disturbance meets all, and the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds + 1):
        for name, job in jobs.items():
            times[name].append(job())
    return {name: statistics.median(seconds[1:]) for name, seconds in times.items()}


def _run(command: Sequence[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def _run_without_index(store: Path, command: Sequence[str]) -> float:
    (store / "index.sqlite").unlink()
    return _run(command)


if __name__ == "__main__":
    sys.exit(main())
