"""What does losing nothing cost? A small adapter published durably, against git and plain copies in the same run.

``Store.put`` of an adapter of rank 8 (three blobs, a manifest, a name) into a store that exists. The peers,
as library calls or processes, with as little else as they can do:

    git hash-object -w + update-ref   three objects and a ref, fsynced as git does it (core.fsync=all)
    cp + sync                         three files copied and made durable
    cp                                three files copied, nothing durable

Processes start once for all rounds where they can; the start of git is measured and printed. Also: fsyncs of a publish
(to reach: at most 12), the collection of half of 1,000 artifacts, and a deep check of the rest.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from loraforge_registry.header import encode_header
from loraforge_registry.ingest import open_adapter
from loraforge_registry.manifest import WEIGHTS_FILE
from loraforge_registry.names import RefName
from loraforge_registry.store import Store

ROUNDS = 40
MANY = 1000
KEY = "base_model.model.layers.{}.q_proj.lora_{}.weight"


def main() -> int:
    """Print the table; return 1 if a publish needs more than 12 fsyncs."""
    with tempfile.TemporaryDirectory(dir=".") as folder:
        root = Path(folder).resolve()  # git runs elsewhere
        sources = [write_adapter(root / f"source{number}", number) for number in range(ROUNDS + 2)]
        store = Store(root / "store")
        publish(store, sources[-1], "first")
        count = fsyncs(lambda: publish(store, sources[-2], "counted"))
        rows = {
            "publish": timed(sources, lambda source: publish(store, source, source.name)),
            "git hash-object -w + update-ref": timed(sources, git_in(root / "git")),
            "cp + sync": timed(sources, lambda source: copy(source, root / "copies", durable=True)),
            "cp": timed(sources, lambda source: copy(source, root / "quick", durable=False)),
            "git --version (its start)": timed(sources, lambda _: run("git", "--version")),
        }
        print(f"fsyncs of a publish: {count}")
        for name, seconds in rows.items():
            print(f"{name:34}{seconds * 1e3:8.1f} ms {rows['publish'] / seconds:7.2f}")
        many(root / "many")
    return 0 if count <= 12 else 1


def many(path: Path) -> None:
    """Collect half of many artifacts, and check the rest."""
    real = os.fsync
    os.fsync = lambda _fd: None  # type: ignore[assignment]  # filling it is not the question
    store = Store(path / "store")
    for number in range(MANY):
        source = write_adapter(path / "source", number)
        publish(store, source, f"n{number}" if number % 2 else None)
        shutil.rmtree(source)
    os.fsync = real
    start = time.perf_counter()
    found = store.gc(dry_run=False)
    middle = time.perf_counter()
    holds = store.fsck(deep=True).holds
    print(f"gc of {len(found.garbage)} objects among {2 * MANY}: {middle - start:.2f} s; ", end="")
    print(f"fsck --deep of the rest: {time.perf_counter() - middle:.2f} s, {'whole' if holds else 'DAMAGED'}")


def publish(store: Store, source: Path, name: str | None) -> None:
    """Store and name an adapter."""
    with open_adapter(source) as incoming:
        store.put(incoming, name=None if name is None else RefName(name))


def git_in(root: Path) -> Callable[[Path], object]:
    """Return a publish with git: objects, and a ref that means the weights."""
    root.mkdir()
    run("git", "init", "-q", "--bare", root)
    git = ("git", "-C", root, "-c", "core.fsync=all", "-c", "core.fsyncMethod=fsync")

    def act(source: Path) -> None:
        said = run(*git, "hash-object", "-w", *sorted(source.iterdir()))
        run(*git, "update-ref", f"refs/tags/{source.name}", said.split()[-1])

    return act


def copy(source: Path, target: Path, *, durable: bool) -> None:
    """Copy the files of an adapter."""
    target.mkdir(exist_ok=True)
    names = [shutil.copy(file, target / f"{source.name}-{file.name}") for file in source.iterdir()]
    for name in [*names, target] if durable else []:
        fd = os.open(name, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def run(*command: object) -> str:
    """Run a command, and return what it says."""
    return subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True).stdout


def timed(sources: list[Path], act: Callable[[Path], object]) -> float:
    """Return the median time over the sources."""
    seconds = []
    for source in sources[:ROUNDS]:
        start = time.perf_counter()
        act(source)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def fsyncs(act: Callable[[], object]) -> int:
    """Count calls of fsync."""
    seen, real = [], os.fsync

    def counting(fd: int) -> None:
        seen.append(fd)
        real(fd)

    os.fsync = counting  # type: ignore[assignment]
    try:
        act()
    finally:
        os.fsync = real
    return len(seen)


def write_adapter(directory: Path, number: int) -> Path:
    """Write a LoRA adapter of its own bytes, with a README."""
    shapes = [(KEY.format(n, letter), "F32", (8, 64) if letter == "A" else (64, 8)) for n in (0, 1) for letter in "AB"]
    directory.mkdir(parents=True)
    (directory / WEIGHTS_FILE).write_bytes(encode_header(shapes) + os.urandom(4 * 8 * 64 * 4))
    (directory / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q_proj"]}'
    )
    (directory / "README.md").write_text(f"adapter {number}\n")
    return directory


if __name__ == "__main__":
    sys.exit(main())
