"""The cache: SQLite writes it, not the store's modules, so each of its calls is killed or failed in the real command.

Whatever became of ``index.sqlite`` and its journal, the answers afterwards are those of a store without one.
"""

import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from loraforge_registry.names import RefName
from loraforge_registry.store import Named, Store
from tests.crash.store_world import World, put, refs_of, violations

CALLS = ("openat", "pwrite64", "unlink", "ftruncate")  # what SQLite changes files with here
FAULTS = ("signal=SIGKILL", "error=ENOSPC", "error=EIO")
ROOT = Path(__file__).parents[2]


@dataclass
class Struck:
    """How many calls were struck, and what was wrong afterwards."""

    points: int = 0
    wrong: list[str] = field(default_factory=list)


def strike_all(world: World, calls: tuple[str, ...] = CALLS, faults: tuple[str, ...] = FAULTS) -> Struck | None:
    """Strike each call of ``ls`` on the cache in turn; None where there is no strace."""
    tracer, found = shutil.which("strace"), Struck()
    if tracer is None:
        return None
    for begin in _beginnings(world):
        _set_cache(world, {})
        expected = Store(world.store).ls()
        for call, fault in itertools.product(calls, faults):
            for number in itertools.count(1):
                _set_cache(world, begin)
                if not _struck(world, tracer, f"{call}:{fault}:when={number}"):
                    break
                found.points += 1
                found.wrong += [f"{call} {number}, {fault}: {line}" for line in _wrong(world, expected)]
    return found


def _beginnings(world: World) -> Iterator[dict[str, bytes]]:
    """A store without a cache, and one whose cache lacks a row."""
    world.reset()
    yield {}
    Store(world.store).ls()
    begin = {path.name: path.read_bytes() for path in _cache(world) if path.exists()}
    put(Store(world.store), world.adapters[5], RefName("new"))
    yield begin


def _struck(world: World, tracer: str, fault: str) -> bool:
    """Run ``ls`` with a fault; whether it came to that."""
    log = world.root / "strace.log"
    paths = [part for path in _cache(world) for part in ("-P", str(path))]
    ran = subprocess.run(
        [tracer, "-f", "-qq", "-o", str(log), *paths, "-e", f"inject={fault}",
         sys.executable, "-m", "loraforge_cli", "--store", str(world.store), "ls", "--json"],
        capture_output=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (".", "registry", "cli"))},
    )  # fmt: skip
    return ran.returncode != 0 or "(INJECTED)" in log.read_text()


def _wrong(world: World, expected: list[Named]) -> list[str]:
    found = violations(world.store, refs_of(world.store), {}, acked=False)
    for _ in range(2):  # the second time from what the first one wrote
        found += [] if Store(world.store).ls() == expected else ["another answer"]
    return found


def _cache(world: World) -> list[Path]:
    return [world.store / f"index.sqlite{end}" for end in ("", "-journal")]


def _set_cache(world: World, contents: dict[str, bytes]) -> None:
    for path in _cache(world):
        path.unlink(missing_ok=True)
        if path.name in contents:
            path.write_bytes(contents[path.name])
