"""Where each user's xorbs are sent to, and what is known of those that were taken away.

A client remembers what it sent to a URL, and sends it there no second time: not in a push next month either. Xorbs do
not stay that long. What was rebuilt from them is a file of the store, so a recipe stays instead: where the chunks of
a xorb lie in that file. A place of which a file is gone, or no longer for this user, is given up. Its URL is never
given out again, and the client begins anew at another.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from loraforge_registry.digest import Digest

REBUILT = 600.0  # seconds that a xorb stays behind its file: a client may send several shards of one upload
FORGOTTEN = 30 * 24 * 3600.0  # seconds without an upload
MAX_RECIPES = 1024
_HASH = re.compile(r"[0-9a-f]{64}")
_PLACE = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class Run:
    """Chunks ``begin`` to ``end`` of a xorb, which lie in a file from ``position`` on."""

    begin: int
    end: int
    digest: Digest
    position: int


@dataclass(frozen=True, slots=True)
class Recipe:
    """The lengths of a xorb's chunks, and where they are."""

    lengths: Sequence[int]
    runs: Sequence[Run]

    def find(self, begin: int, end: int) -> Iterator[tuple[Digest, int, int]]:
        """Yield the ranges of files that chunks ``begin`` to ``end`` are; it ends early where one is not known."""
        starts = [0, *accumulate(self.lengths)]
        while begin < end:
            run = next((run for run in self.runs if run.begin <= begin < run.end), None)
            if run is None:
                return
            until = min(end, run.end)
            first = run.position + starts[begin] - starts[run.begin]
            yield run.digest, first, first + starts[until] - starts[begin]
            begin = until


def open_place(scratch: Path, user: str, is_there: Callable[[Digest], bool]) -> str:
    """Return the place that a user's xorbs are sent to; a new one where a file of the old one is not there."""
    named = scratch / f"place-{hashlib.sha256(user.encode()).hexdigest()[:32]}"
    with suppress(OSError):
        place = named.read_text()
        if _PLACE.fullmatch(place) and _is_whole(directory_of(scratch, place), is_there):
            return place
    place = secrets.token_hex(16)
    directory_of(scratch, place).mkdir(mode=0o700)
    _write(named, place)
    return place


def directory_of(scratch: Path, place: str) -> Path:
    """The directory of a place."""
    return scratch / f"cas-{place}"


def give_up(scratch: Path, place: str) -> None:
    """Take a place away: what clients remember of it counts no longer."""
    if _PLACE.fullmatch(place):
        shutil.rmtree(directory_of(scratch, place), ignore_errors=True)


def waiting(directory: Path) -> int:
    """The bytes of xorbs that lie in a place; another upload may end, and take some away, meanwhile."""
    size = 0
    for path in directory.iterdir():
        with suppress(FileNotFoundError):
            size += path.stat().st_size if _HASH.fullmatch(path.name) else 0
    return size


def recipe_of(directory: Path, xorb: str) -> Recipe | None:
    """What is known of a xorb."""
    try:
        found = json.loads((directory / f"{xorb}.json").read_bytes())
        runs = [Run(begin, end, Digest("sha256", hexed), at) for begin, end, hexed, at in found["runs"]]
        return Recipe([int(length) for length in found["lengths"]], runs)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remember(directory: Path, xorb: str, lengths: Sequence[int], runs: Sequence[Run]) -> None:
    """Keep where chunks of a xorb lie; what is known of it already stays."""
    known = recipe_of(directory, xorb)
    every = {*runs, *(known.runs if known is not None else ())}
    rows = sorted([run.begin, run.end, run.digest.hex, run.position] for run in every)
    _write(directory / f"{xorb}.json", json.dumps({"lengths": list(lengths), "runs": rows}))


def clean(scratch: Path) -> None:
    """Take away xorbs that recipes stand for, and what uploads that never ended have left."""
    now = time.time()
    for directory in scratch.iterdir():
        with suppress(OSError):
            age = now - directory.stat().st_mtime
            if directory.name.startswith("cas-") and age < FORGOTTEN:
                _clean_place(directory, now)
            elif age > (FORGOTTEN if directory.name.startswith(("cas-", "place-")) else 24 * 3600.0):
                shutil.rmtree(directory, ignore_errors=True)
                directory.unlink(missing_ok=True)


def _clean_place(directory: Path, now: float) -> None:
    kept = {path.stem for path in directory.glob("*.json")}
    for path in directory.iterdir():
        if path.suffix != ".json":
            age = now - path.stat().st_mtime
            if age > (REBUILT if path.name in kept else 24 * 3600.0):
                path.unlink()


def _is_whole(directory: Path, is_there: Callable[[Digest], bool]) -> bool:
    names = [path.stem for path in directory.iterdir() if path.suffix == ".json"]
    recipes = [recipe_of(directory, name) for name in names]
    if None in recipes or len(recipes) > MAX_RECIPES:
        return False
    return all(is_there(digest) for digest in {run.digest for recipe in recipes if recipe for run in recipe.runs})


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(secrets.token_hex(8))
    temporary.write_text(text)
    os.replace(temporary, path)  # noqa: PTH105 - Path.replace returns a path that nobody needs
