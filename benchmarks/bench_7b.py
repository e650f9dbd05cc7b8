"""How long does it take, and in how much memory, to re-rank an adapter of a 7B model from directory to directory?

Llama-7B's 224 matrices at rank 64 (160 million parameters, 640 MB in float32) go to rank 16:
``lf.save(lf.rerank(lf.load(source), rank=16).adapter, out)``, in a fresh process for each row. The limit is the disk:
a copy of the input with fsync, made in the same run.

To reach: below 60 s on two cores, and a private memory of at most the libraries, the result (160 MB) and 100 MB more:
nothing else is held than one matrix's work. The peak also counts pages of the mapped input, which the system takes
back when it needs them. Needs Linux: memory is read from /proc.
"""

import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterator

LAYERS, HIDDEN, INNER = 32, 4096, 11008
RANK_BEFORE, RANK = 64, 16
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
T = TypeVar("T")


@dataclass
class Cost:
    """Seconds of each step, and the largest sizes seen, in bytes; ``idle`` is the memory of the imported libraries."""

    seconds: dict[str, float] = field(default_factory=dict)
    idle: int = 0
    peak: int = 0
    private: int = 0


def main() -> int:
    """Print the table; return 1 if the result is not what was asked for."""
    print(f"{'7B, r64 to r16':16}{'threads':>8}{'s':>7}{'rerank s':>10}{'save s':>8}{'copy s':>8}{'copies':>8}"
          f"{'peak MB':>9}{'private':>9}{'libraries':>11}")  # fmt: skip
    right = True
    with tempfile.TemporaryDirectory() as folder:
        for dtype in ("float32", "bfloat16"):
            source = Path(folder) / dtype
            _apart(partial(write_adapter, source, dtype))
            for threads in (1, 2):
                copy = time_copy(source, Path(folder) / "copy")
                out = Path(folder) / "out"
                cost = _apart(partial(run, source, out, threads))
                right = _apart(partial(is_right, source, out)) and right
                shutil.rmtree(out)
                total = sum(cost.seconds.values())
                print(f"{dtype:16}{threads:8}{total:7.1f}{cost.seconds['rerank']:10.1f}{cost.seconds['save']:8.2f}"
                      f"{copy:8.2f}{total / copy:8.1f}{cost.peak / 1e6:9.0f}{cost.private / 1e6:9.0f}"
                      f"{cost.idle / 1e6:11.0f}")  # fmt: skip
            shutil.rmtree(source)
    return 0 if right else 1


def run(source: Path, out: Path, threads: int) -> Cost:
    """Load, re-rank, save; what is timed is what a user would write."""
    import torch

    import loraforge as lf

    torch.set_num_threads(threads)
    torch.linalg.svd(torch.eye(8))  # loads the library
    lf.rerank, lf.save, lf.load  # noqa: B018 - imports what they need
    cost = Cost(idle=_status("RssAnon"))
    with _watch(cost):
        start = time.perf_counter()
        adapter = lf.load(source)
        loaded = time.perf_counter()
        small = lf.rerank(adapter, rank=RANK).adapter
        ranked = time.perf_counter()
        lf.save(small, out)
        cost.seconds = {"load": loaded - start, "rerank": ranked - loaded, "save": time.perf_counter() - ranked}
    return cost


def is_right(source: Path, out: Path) -> bool:
    """Whether every target has the rank, and one of them the distance that a re-rank of it alone reports."""
    import loraforge as lf
    from loraforge.compose import compare

    before, after = lf.load(source), lf.load(out)
    name = min(before.targets)
    one_before, one_after = (lf.Adapter({name: adapter.targets[name]}) for adapter in (before, after))
    found = compare(one_before, one_after)[0].relative
    expected = lf.rerank(one_before, rank=RANK).report.error
    same = set(before.targets) == set(after.targets) and all(p.rank == RANK for p in after.targets.values())
    return same and found is not None and abs(found - expected) < 1e-6


def write_adapter(directory: Path, dtype: str) -> None:
    """Write random factors, whose spectrum is the slowest to tell apart, as PEFT's files."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    tensors = {}
    for layer in range(LAYERS):
        for module, (m, n) in SHAPES.items():
            key = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{key}.lora_A.weight"] = (torch.randn(RANK_BEFORE, n) / n**0.5).to(getattr(torch, dtype))
            tensors[f"{key}.lora_B.weight"] = (torch.randn(m, RANK_BEFORE) * 0.02).to(getattr(torch, dtype))
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = sorted(module.rpartition(".")[2] for module in SHAPES)
    config = {"peft_type": "LORA", "r": RANK_BEFORE, "lora_alpha": RANK_BEFORE, "target_modules": targets}
    (directory / "adapter_config.json").write_text(json.dumps(config))


def time_copy(source: Path, target: Path) -> float:
    """Copy every file and wait for the disk; the input is in memory, as it is for the re-rank."""
    start = time.perf_counter()
    target.mkdir()
    for path in source.iterdir():
        shutil.copyfile(path, target / path.name)
        fd = os.open(target / path.name, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
    elapsed = time.perf_counter() - start
    shutil.rmtree(target)
    return elapsed


@contextmanager
def _watch(cost: Cost) -> "Iterator[None]":
    """Follow this process's memory: the peak as the kernel keeps it, the private part by looking."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident
    stop = threading.Event()

    def look() -> None:
        while not stop.wait(0.02):
            cost.private = max(cost.private, _status("RssAnon"))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        cost.peak = _status("VmHWM")


def _apart(function: Callable[[], T]) -> T:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function).result()


def _status(what: str) -> int:
    """Read bytes from /proc/self/status."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(f"{what}:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    sys.exit(main())
