"""How long does merging an adapter into a checkpoint take over copying it, and in how much memory?

A rank-16 adapter on all seven projections, |dW| / |W| about 0.005, goes into a random bfloat16 checkpoint of the shape
of TinyLlama (1.1 billion parameters, 2.2 GB): ``merge`` without and with a receipt, and ``unmerge``. The limit is
``cp -r`` of the same directory; the peers are PEFT (load, ``merge_and_unload``, ``save_pretrained``) and mergekit.

The rows take turns, each in a fresh process that has imported what it needs and done the same to a model of two layers
before the clock starts. Everything is in the page cache; the wait for the disk at the end is a column of its own, and
"x in all" compares what it takes with that wait: until the model, or the copy, is on the disk.
"x cp" is the median of the ratios to the copy of the same round, "x of min" the ratio of the minima. Memory is the
process's peak while it ran, from /proc (needs Linux), "libraries" what was resident before; pages of a mapped input
count, those of the page cache do not.

Where memory is slow to come by for the first time (in many virtual machines), a write of 2 GB takes 0.7 s or 10, by
chance. So every clock starts right after a file of the checkpoint's size was written and deleted; even so a
median of five may be off, and the minimum says more.

    python benchmarks/bench_merge.py [--folder DIR] [--mergekit PYTHON] [--large] [--rounds 5] [--shards 1]

``--folder`` is on a disk, not in memory (default: here); 9 GB are used at most, 17 with ``--large``, which also
measures the memory of a merge into a checkpoint of four times the layers. ``--mergekit`` is the interpreter of an
environment that has mergekit; without it that row is left out. Five rounds take a quarter of an hour on two cores.
"""

import argparse
import filecmp
import importlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

if TYPE_CHECKING:
    from torch import Tensor

# The children of the mergekit row run this file where neither loraforge nor its dependencies are: the standard
# library above, all else inside the functions that need it.

RANK, ALPHA, SIZE = 16, 32.0, 0.005  # SIZE is |dW| / |W|
SPREAD = 0.02  # the standard deviation of the weights
PIECE = 4 * 1024 * 1024
RECEIPT = "loraforge.receipt"
Run = Callable[[Path, Path], None]
"""Takes (a folder with ``base``, ``adapter`` and, for unmerge, ``merged``; the directory to make)."""


@dataclass(frozen=True)
class Llama:
    """The shape of a model, by default TinyLlama's."""

    layers: int = 22
    hidden: int = 2048
    inner: int = 5632
    heads: int = 32
    kv_heads: int = 4
    vocabulary: int = 32000

    @property
    def targets(self) -> dict[str, tuple[int, int]]:
        """The projections that the adapter changes: module to (out, in)."""
        kv = self.hidden // self.heads * self.kv_heads
        shapes = {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.inner, self.hidden),
            "mlp.up_proj": (self.inner, self.hidden),
            "mlp.down_proj": (self.hidden, self.inner),
        }
        return {
            f"model.layers.{layer}.{module}": shape for layer in range(self.layers) for module, shape in shapes.items()
        }

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the checkpoint."""
        norms = ("input_layernorm", "post_attention_layernorm")
        return {
            "model.embed_tokens.weight": (self.vocabulary, self.hidden),
            **{f"{module}.weight": shape for module, shape in self.targets.items()},
            **{f"model.layers.{layer}.{norm}.weight": (self.hidden,) for layer in range(self.layers) for norm in norms},
            "model.norm.weight": (self.hidden,),
            "lm_head.weight": (self.vocabulary, self.hidden),
        }

    @property
    def nbytes(self) -> int:
        """The size of all tensors."""
        return sum(map(_nbytes, self.tensors.values()))

    @property
    def touched(self) -> int:
        """The size of the tensors that the adapter changes."""
        return sum(map(_nbytes, self.targets.values()))

    @property
    def config(self) -> dict[str, object]:
        """What transformers reads."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }


@dataclass(frozen=True)
class Cost:
    """What one run took: seconds before the final wait for the disk, seconds of that wait, bytes of memory."""

    seconds: float
    fsync: float
    peak: int
    idle: int


@dataclass
class Row:
    """One line of the table: how it is done and by which interpreter, and what it cost, round by round."""

    kind: str
    python: str = sys.executable
    costs: list[Cost] = field(default_factory=list)


def main() -> int:
    """Print the tables; return 1 if a result is not what it has to be."""
    arguments = _arguments()
    with tempfile.TemporaryDirectory(prefix=".bench-merge-", dir=arguments.folder) as name:
        folder = Path(name)
        if (problem := _unfit(folder, large=arguments.large)) is not None:
            print(problem, file=sys.stderr)
            return 2
        rows = {"merge": Row("merge"), "cp -r": Row("cp"), "merge with receipt": Row("merge_with_receipt")}
        rows |= {"unmerge": Row("unmerge"), "PEFT": Row("peft")}
        if (absent := _why_no_mergekit(arguments.mergekit)) is None:
            rows["mergekit"] = Row("mergekit", arguments.mergekit)
        small = Llama(layers=arguments.layers)
        right, receipt = compare(folder, small, rows, rounds=arguments.rounds, shards=arguments.shards)
        shutil.rmtree(folder / "full")
        print_table(small, rows, receipt)
        if absent is not None:
            print(f"mergekit: left out; {absent}")
        if arguments.large:
            large = Llama(layers=4 * arguments.layers)
            memory = measure_memory(folder, large, list(rows.values())[:3:2], shards=arguments.shards)
            print_memory(small, large, rows, memory)
    return 0 if right else 1


def compare(folder: Path, model: Llama, rows: Mapping[str, Row], *, rounds: int, shards: int) -> tuple[bool, int]:
    """Run all rows in turns; return whether the results are right, and the receipt's size in bytes."""
    write_inputs(folder / "tiny", Llama(2, 64, 128, 4, 2, 256), shards=1)
    write_inputs(folder / "full", model, shards=shards)
    full, out, right, receipt = folder / "full", folder / "out", True, 0
    for number in range(rounds):
        samples: dict[str, dict[str, Tensor]] = {"base": sample(full / "base", model)}
        for row in rows.values():
            row.costs.append(_in_child(row, folder))
            if number == 0 and row.kind == "unmerge":
                right = _same_files(full / "base", out)
            elif number == 0:
                samples[row.kind] = sample(out, model)
            if row.kind == "merge_with_receipt":
                receipt = (out / RECEIPT).stat().st_size
                out.rename(full / "merged")  # what unmerge reads
            else:
                shutil.rmtree(out)
        shutil.rmtree(full / "merged")
        right = right and (number > 0 or _agree(samples))
    return right, receipt


def measure_memory(folder: Path, model: Llama, rows: list[Row], *, shards: int) -> dict[str, Cost]:
    """Run some rows once, on another model."""
    write_inputs(folder / "full", model, shards=shards)
    found = {}
    for row in rows:
        found[row.kind] = _in_child(row, folder)
        shutil.rmtree(folder / "out")
    return found


# What is compared. Each imports, and returns what is timed.


def prepare_merge() -> Run:
    """Merge, and leave no receipt."""
    return _merge(receipt=False)


def prepare_merge_with_receipt() -> Run:
    """Merge, and leave what it takes to go back."""
    return _merge(receipt=True)


def prepare_unmerge() -> Run:
    """Restore the base."""
    from loraforge.checkpoint.merge import unmerge

    def run(folder: Path, out: Path) -> None:
        unmerge(folder / "merged", out=out, adapters=[folder / "adapter"])

    return run


def prepare_cp() -> Run:
    """Copy: the limit."""

    def run(folder: Path, out: Path) -> None:
        subprocess.run(["cp", "-r", folder / "base", out], check=True)

    return run


def prepare_peft() -> Run:
    """Merge as PEFT's documentation does."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def run(folder: Path, out: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype="auto")
        PeftModel.from_pretrained(model, folder / "adapter").merge_and_unload().save_pretrained(out)

    return run


def prepare_mergekit() -> Run:
    """Merge by mergekit's reference to a base with an adapter, ``BASE+ADAPTER``; what it caches is part of the job."""
    # by name: type checkers need not know it
    config = importlib.import_module("mergekit.config").MergeConfiguration
    options = importlib.import_module("mergekit.options").MergeOptions
    run_merge = importlib.import_module("mergekit.merge").run_merge

    def run(folder: Path, out: Path) -> None:
        model = f"{folder / 'base'}+{folder / 'adapter'}"
        asked = {"merge_method": "passthrough", "models": [{"model": model}], "dtype": "bfloat16"}
        given = options(lora_merge_cache=str(folder / "cache"), copy_tokenizer=False, quiet=True)
        run_merge(config.model_validate(asked), str(out), given)

    return run


PREPARE: Mapping[str, Callable[[], Run]] = {
    "merge": prepare_merge,
    "merge_with_receipt": prepare_merge_with_receipt,
    "unmerge": prepare_unmerge,
    "cp": prepare_cp,
    "peft": prepare_peft,
    "mergekit": prepare_mergekit,
}


def _merge(*, receipt: bool) -> Run:
    from loraforge.checkpoint.merge import merge

    def run(folder: Path, out: Path) -> None:
        merge(folder / "base", [(folder / "adapter", 1.0)], out=out, receipt=receipt)

    return run


# One run, in its own process.


def child(kind: str, folder: Path) -> int:
    """Do one row once, and print its cost."""
    run = PREPARE[kind]()
    if kind == "unmerge" and not (folder / "tiny" / "merged").exists():
        prepare_merge_with_receipt()(folder / "tiny", folder / "tiny" / "merged")
    run(folder / "tiny", folder / "tiny" / "out")  # loads what is loaded on first use
    for made in ("out", "cache"):
        shutil.rmtree(folder / "tiny" / made, ignore_errors=True)
    print(json.dumps(asdict(measure(run, folder))))
    shutil.rmtree(folder / "full" / "cache", ignore_errors=True)
    return 0


def measure(run: Run, folder: Path) -> Cost:
    """Run on the full model, from a warm page cache; the wait for the disk is timed apart, whoever waits."""
    full, out = folder / "full", folder / "out"
    for path in (full / "base").iterdir():
        _read(path)
    os.sync()
    touch_memory(folder / "touched", sum(path.stat().st_size for path in (full / "base").iterdir()))
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident
    idle = _status("VmRSS")
    with _timed_fsync() as waits:
        start = time.perf_counter()
        run(full, out)
        elapsed = time.perf_counter() - start - sum(waits)
        peak = _status("VmHWM")
        for path in out.iterdir():
            fsync(path)
    return Cost(elapsed, sum(waits), peak, idle)


def touch_memory(path: Path, size: int) -> None:
    """Write a file and delete it: the page cache's next pages have been used before."""
    data = os.urandom(PIECE)
    with path.open("wb", buffering=0) as file:
        for _ in range(size // PIECE):
            file.write(data)
    path.unlink()


def fsync(path: Path) -> None:
    """Wait until a file is on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def _timed_fsync() -> Iterator[list[float]]:
    """Note how long each fsync takes: ours ends with them, cp and the others leave them to whoever cares."""
    waits: list[float] = []
    original = os.fsync

    def timed(fd: int) -> None:
        start = time.perf_counter()
        original(fd)
        waits.append(time.perf_counter() - start)

    with mock.patch("os.fsync", timed):
        yield waits


def _in_child(row: Row, folder: Path) -> Cost:
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [row.python, __file__, "--child", row.kind, "--folder", str(folder)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env={**os.environ, **quiet})
    if done.returncode:
        raise RuntimeError(f"{row.kind} failed:\n{done.stderr[-4000:]}")
    return Cost(**json.loads(done.stdout.splitlines()[-1]))


# What goes in.


def write_inputs(folder: Path, model: Llama, *, shards: int) -> None:
    """Write a base and an adapter."""
    write_base(folder / "base", model, shards=shards)
    write_adapter(folder / "adapter", model)


def write_base(directory: Path, model: Llama, *, shards: int) -> None:
    """Write a checkpoint, of one file or several, in pieces: it is never in memory."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(model.config, indent=2))
    files: dict[str, list[str]] = {}
    position = 0
    for name, shape in model.tensors.items():
        files.setdefault(_shard_name(position * shards // model.nbytes, shards), []).append(name)
        position += _nbytes(shape)
    for file, names in files.items():
        _write_shard(directory / file, {name: model.tensors[name] for name in names})
    if shards > 1:
        weight_map = {name: file for file, names in files.items() for name in names}
        index = {"metadata": {"total_size": model.nbytes}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def write_adapter(directory: Path, model: Llama) -> None:
    """Write an adapter in PEFT's format whose update is ``SIZE`` of the weights.

    ``|scale B A| = scale sqrt(m n r) s_A s_B`` for entries of deviation s_A, s_B; ``|W| = SPREAD sqrt(m n)``.
    """
    import torch

    import loraforge as lf

    generator = torch.Generator().manual_seed(1)
    pairs = {}
    for target, (m, n) in model.targets.items():
        s_a = n**-0.5
        s_b = SIZE * SPREAD / (ALPHA / RANK * RANK**0.5 * s_a)
        a, b = torch.randn(RANK, n, generator=generator) * s_a, torch.randn(m, RANK, generator=generator) * s_b
        pairs[target] = lf.LowRank("linear", a, b, alpha=ALPHA)
    lf.save(lf.Adapter(pairs), directory)


def _write_shard(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    import torch

    from loraforge_registry.header import encode_header, parse_header

    start = encode_header((name, "BF16", shape) for name, shape in shapes.items())
    header = parse_header(start[8:], len(start) + sum(map(_nbytes, shapes.values())))
    generator = torch.Generator().manual_seed(0)
    with path.open("wb", buffering=0) as file:
        file.write(start)
        for entry in header.tensors:
            left = entry.elements
            while left:
                count = min(left, PIECE)
                values = torch.randn(count, generator=generator) * SPREAD if len(entry.shape) > 1 else torch.ones(count)
                file.write(values.bfloat16().view(torch.uint8).numpy().data)
                left -= count


def _shard_name(number: int, shards: int) -> str:
    return "model.safetensors" if shards == 1 else f"model-{number + 1:05}-of-{shards:05}.safetensors"


# Whether it is right.


def sample(directory: Path, model: Llama) -> "dict[str, Tensor]":
    """Read two of the tensors that change."""
    from safetensors import safe_open

    last = model.layers - 1
    wanted = {"model.layers.0.self_attn.q_proj.weight", f"model.layers.{last}.mlp.down_proj.weight"}
    found: dict[str, Tensor] = {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name).clone() for name in wanted & set(file.keys())}
    return found


def _agree(samples: "dict[str, dict[str, Tensor]]") -> bool:
    """Whether a copy is the base, and every merge is ours but for one element in a thousand: PEFT rounds twice."""
    right = True
    for name, base in samples["base"].items():
        ours = samples["merge"][name]
        right = right and bool((samples["cp"][name] == base).all()) and bool((ours != base).float().mean() > 0.01)
        for kind in samples.keys() - {"base", "cp", "merge"}:
            found = samples[kind][name]
            right = right and found.dtype == ours.dtype and bool((found != ours).float().mean() < 1e-3)
    return right


def _same_files(one: Path, other: Path) -> bool:
    """Whether two directories hold the same files, byte for byte."""
    names = sorted(os.listdir(one))
    return names == sorted(os.listdir(other)) and all(filecmp.cmp(one / n, other / n, shallow=False) for n in names)


# What is printed.


def print_table(model: Llama, rows: Mapping[str, Row], receipt: int) -> None:
    """Print times, ratios and memory."""
    title = f"{model.nbytes / 2e9:.2f} B parameters, {model.nbytes / 1e9:.2f} GB"
    print(
        f"{title:28}{'median s':>9}{'min s':>7}{'x cp':>7}{'x of min':>9}{'fsync s':>9}{'x in all':>9}{'peak MB':>9}"
        f"{'libraries':>11}"
    )
    copies = [cost.seconds for cost in rows["cp -r"].costs]
    durable = [cost.seconds + cost.fsync for cost in rows["cp -r"].costs]
    for name, row in rows.items():
        seconds = [cost.seconds for cost in row.costs]
        paired = statistics.median(s / copy for s, copy in zip(seconds, copies, strict=True))
        wait = statistics.median(cost.fsync for cost in row.costs)
        whole = [cost.seconds + cost.fsync for cost in row.costs]
        total = statistics.median(s / copy for s, copy in zip(whole, durable, strict=True))
        memory = "" if row.kind == "cp" else _memory(row.costs)
        print(f"{name:28}{statistics.median(seconds):9.2f}{min(seconds):7.2f}{paired:7.2f}"
              f"{min(seconds) / min(copies):9.2f}{wait:9.2f}{total:9.2f}{memory}")  # fmt: skip
    share = receipt / model.touched
    print(f"receipt: {receipt / 1e6:.1f} MB, {share:.2%} of the {model.touched / 1e9:.2f} GB that were touched")


def print_memory(small: Llama, large: Llama, rows: Mapping[str, Row], memory: Mapping[str, Cost]) -> None:
    """Print the memory of both sizes."""
    titles = [f"{model.nbytes / 1e9:.1f} GB: peak MB, libraries" for model in (small, large)]
    print(f"\n{'memory':28}{titles[0]:>32}{titles[1]:>32}{'more MB':>9}")
    for name, row in rows.items():
        if row.kind in memory:
            before, after = max(row.costs, key=lambda cost: cost.peak), memory[row.kind]
            more = (after.peak - after.idle - before.peak + before.idle) / 1e6
            print(f"{name:28}{_memory([before]):>32}{_memory([after]):>32}{more:9.0f}")


def _memory(costs: list[Cost]) -> str:
    most = max(costs, key=lambda cost: cost.peak)
    return f"{most.peak / 1e6:9.0f}{most.idle / 1e6:11.0f}"


def _unfit(folder: Path, *, large: bool) -> str | None:
    """Return why a folder cannot be used, if it cannot."""
    kind = subprocess.run(["stat", "-f", "-c", "%T", folder], check=True, capture_output=True, text=True).stdout.strip()
    if kind in ("tmpfs", "ramfs"):
        return f"{folder.parent} is in memory ({kind}); name a folder on a disk with --folder"
    free, needed = shutil.disk_usage(folder).free / 1e9, 17 if large else 9
    return f"{folder.parent} has {free:.1f} GB free, {needed} are needed" if free < needed else None


def _why_no_mergekit(python: str | None) -> str | None:
    """Return why there is no row of mergekit, if there is none."""
    if python is None:
        return "name an interpreter that has it with --mergekit"
    try:
        done = subprocess.run([python, "-c", "import mergekit.merge"], check=False, capture_output=True, text=True)
    except OSError as error:
        return f"{python} cannot be run: {error.strerror}"
    return f"{python} cannot import it: {done.stderr.strip().splitlines()[-1]}" if done.returncode else None


def _read(path: Path) -> None:
    with path.open("rb", buffering=0) as file:
        while file.read(PIECE):
            pass


def _nbytes(shape: tuple[int, ...]) -> int:
    """The size of a bfloat16 tensor."""
    return 2 * (shape[0] * shape[1] if len(shape) > 1 else shape[0])


def _status(what: str) -> int:
    """Read bytes from /proc/self/status."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(f"{what}:"))
    return int(line.split()[1]) * 1024


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="where on a disk to work")
    parser.add_argument("--mergekit", help="an interpreter that has mergekit")
    parser.add_argument("--large", action="store_true", help="also measure memory with four times the layers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shards", type=int, default=1, help="files of the checkpoint")
    parser.add_argument("--layers", type=int, default=22, help="layers of the checkpoint")
    parser.add_argument("--child", choices=PREPARE, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        sys.exit(child(arguments.child, arguments.folder))
    return arguments


if __name__ == "__main__":
    sys.exit(main())
