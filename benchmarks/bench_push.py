"""What does pushing an adapter into the store cost over hashing the file and copying it durably?

A file of 1 GB goes into a store that exists: checked, hashed twice (SHA-256 of the file, BLAKE3 of every tensor),
copied and made durable, by ``Store.put(open_adapter(...))``. The peers do less, one step after the other:
``sha256sum FILE``, ``cp FILE COPY``, ``sync COPY``; and the same with SHA-256 from Python's OpenSSL, which uses the
processor's own instructions where it has them, and sha256sum may not.

To reach: at most 1.3 times sha256sum + cp + sync. All three take turns in one run; medians.
"""

import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from loraforge_registry.header import encode_header
from loraforge_registry.ingest import open_adapter
from loraforge_registry.manifest import WEIGHTS_FILE
from loraforge_registry.store import Store

ROUNDS = 5
PAIRS, RANK, WIDTH = 119, 256, 4096  # 998 MB in float32
KEY = "base_model.model.layers.{}.q_proj.lora_{}.weight"


def main() -> int:
    """Print the table; return 1 if the digests differ."""
    rows: dict[str, list[float]] = {"push": [], "sha256sum + cp + sync": [], "OpenSSL + cp + sync": []}
    right = True
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        file = write_adapter(root / "large", PAIRS, RANK, WIDTH)
        write_adapter(root / "tiny", 1, 1, 8)
        for _ in range(ROUNDS):
            pushed, digest = time_push(root)
            peer, expected = time_peer(file, root / "copy")
            openssl, _ = time_openssl(file, root / "copy")
            for seconds, row in zip((pushed, peer, openssl), rows.values(), strict=True):
                row.append(seconds)
            right = right and digest == expected
        size = file.stat().st_size
    medians = {name: statistics.median(seconds) for name, seconds in rows.items()}
    print(f"{f'{size / 1e9:.2f} GB':24}{'s':>7}{'GB/s':>8}{'push is':>9}")
    for name, seconds in medians.items():
        print(f"{name:24}{seconds:7.2f}{size / seconds / 1e9:8.2f}{medians['push'] / seconds:9.2f}")
    return 0 if right else 1


def time_push(root: Path) -> tuple[float, str]:
    """Push into a new store that already holds something: making it is not what is asked."""
    store = Store(root / "store")
    with open_adapter(root / "tiny") as incoming:
        store.put(incoming)
    _settle()
    start = time.perf_counter()
    with open_adapter(root / "large") as incoming:
        artifact = store.put(incoming)
    elapsed = time.perf_counter() - start
    digest = store.manifest(artifact.digest).file(WEIGHTS_FILE).digest.hex
    shutil.rmtree(root / "store")
    return elapsed, digest


def time_peer(file: Path, copy: Path) -> tuple[float, str]:
    """Run what a careful person would type."""
    _settle()
    start = time.perf_counter()
    said = subprocess.run(["sha256sum", file], check=True, capture_output=True, text=True).stdout
    _copy(file, copy)
    elapsed = time.perf_counter() - start
    copy.unlink()
    return elapsed, said.split()[0].removeprefix("\\")


def time_openssl(file: Path, copy: Path) -> tuple[float, str]:
    """Do the same with the fastest SHA-256 at hand."""
    _settle()
    start = time.perf_counter()
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    _copy(file, copy)
    elapsed = time.perf_counter() - start
    copy.unlink()
    return elapsed, digest


def write_adapter(directory: Path, pairs: int, rank: int, width: int) -> Path:
    """Write a LoRA adapter of random bytes; returns its weights file."""
    shapes = [
        (KEY.format(number, letter), "F32", (rank, width) if letter == "A" else (width, rank))
        for number in range(pairs)
        for letter in "AB"
    ]
    directory.mkdir()
    with (directory / WEIGHTS_FILE).open("wb") as file:
        file.write(encode_header(shapes))
        for _ in shapes:
            file.write(os.urandom(rank * width * 4))
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["q_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory / WEIGHTS_FILE


def _copy(file: Path, copy: Path) -> None:
    subprocess.run(["cp", file, copy], check=True)
    subprocess.run(["sync", copy], check=True)


def _settle() -> None:
    """Let the disk finish what came before."""
    os.sync()


if __name__ == "__main__":
    sys.exit(main())
