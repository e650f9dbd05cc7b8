"""What a crash may leave, and how every crash of a command is tried: see ``driver`` for how it comes about."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from loraforge.checkpoint.reader import INDEX, SINGLE, open_checkpoint
from loraforge.errors import LoraforgeError
from tests.bad_files import PREFIX, Tensors, config, file_bytes, header_fields, write_adapter
from tests.crash.driver import KILLED, Fault

PAGE = 4096
JOURNAL = "loraforge.journal"
RECEIPT = "loraforge.receipt"
ROOT = Path(__file__).resolve().parents[2]
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
# bf16; no tensor begins or ends with a page, two touched ones share one, and each file has one that nothing touches
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    FIRST: {
        "model.layers.0.q.weight": (72, 100),
        "model.layers.0.v.weight": (40, 110),
        "model.layers.0.norm.weight": (50,),
    },
    SECOND: {"model.layers.1.k.weight": (60, 90), "model.embed_tokens.weight": (30, 64), "lm_head.weight": (48, 100)},
}
SHAPE_OF = {name: shape for shapes in SHAPES.values() for name, shape in shapes.items()}

Files = dict[str, bytes]
Contents = dict[str, tuple[str, tuple[int, ...], bytes]]


@dataclass(frozen=True)
class Command:
    """A command on some directories."""

    name: str
    model: Path
    adapters: tuple[tuple[Path, float], ...]
    out: Path | None = None

    @property
    def in_place(self) -> bool:
        return self.out is None

    @property
    def opposite(self) -> "Command":
        """What takes it back."""
        return replace(self, name=self.name[2:] if self.name.startswith("un") else f"un{self.name}")


@dataclass(frozen=True)
class Run:
    """What became of a command: the calls that it made or was about to make, and how it ended."""

    calls: tuple[Mapping[str, Any], ...]
    killed: bool
    error: Mapping[str, Any] | None
    audit: tuple[str, ...] = ()

    @property
    def places(self) -> list[tuple[str, str]]:
        """The calls, and what they worked on."""
        return [(call["call"], Path(call["path"]).name) for call in self.calls]

    @property
    def done(self) -> bool:
        return not self.killed and self.error is None

    def raised(self, name: str) -> bool:
        """Whether it ended in an error of this kind."""
        return self.error is not None and name in self.error["types"]

    @property
    def ending(self) -> str:
        return "killed" if self.killed else "done" if self.error is None else self.error["trace"]


class Driver:
    """The process that does commands."""

    def __init__(self, process: "subprocess.Popen[str]", complaints: Path) -> None:
        self._process, self._complaints = process, complaints

    def run(
        self,
        command: Command,
        fault: Fault | None = None,
        *,
        mutant: str = "",
        threads: bool = False,
        poor: bool = False,
        short: bool = False,
        watched: bool = False,
    ) -> Run:
        """Do a command.

        ``poor`` is a file system that can neither reserve nor copy; ``short`` one whose writes stop half way;
        ``threads`` leaves the order of the calls to two threads; ``watched`` asks the interpreter, too, what changed.
        """
        dying = fault is not None and fault.kind != "error"
        request = {
            "command": command.name,
            "model": str(command.model),
            "out": str(command.out),
            "adapters": [(str(path), weight) for path, weight in command.adapters],
            "fault": None if fault is None else asdict(fault),
            "mutant": mutant,
            "threads": threads,
            "poor": poor,
            "short": short,
            "watched": watched,
            "forked": dying or threads or watched,
        }
        said = self._ask(request)
        status = next((fact["status"] for fact in said if "status" in fact), 0)
        ends = [fact["error"] for fact in said if "error" in fact]
        assert status in (0, KILLED), self._complaints.read_text()
        assert len(ends) == (status == 0), said
        return Run(
            calls=tuple(fact for fact in said if "call" in fact),
            killed=status == KILLED,
            error=ends[0] if ends else None,
            audit=tuple(name for fact in said for name in fact.get("audit", ())),
        )

    def _ask(self, request: Mapping[str, object]) -> list[dict[str, Any]]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, self._complaints.read_text()
        return json.loads(answer)


@contextmanager
def driver_process() -> Iterator[Driver]:
    """Start the process, and end it."""
    one = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
    with tempfile.TemporaryDirectory() as directory:
        complaints = Path(directory) / "complaints"
        environment = os.environ | one
        environment |= {
            "PYTHONPATH": os.pathsep.join(str(ROOT / place) for place in ("", "registry", "cli")),
            "PYTHONDONTWRITEBYTECODE": "1",
            "LORAFORGE_STORE": str(Path(directory) / "store"),
        }
        with (
            complaints.open("w") as stderr,
            subprocess.Popen(
                [sys.executable, "-m", "tests.crash.driver"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=environment,
            ) as process,
        ):
            yield Driver(process, complaints)


def write_base(directory: Path, *, single: bool) -> Path:
    """Write a base: two shards with their index, or one file; a configuration and a tokenizer."""
    directory.mkdir()
    numbers = np.random.Generator(np.random.PCG64(7))
    shards = {SINGLE: SHAPE_OF} if single else SHAPES
    for shard, shapes in shards.items():
        rows: Tensors = {}
        for name, shape in shapes.items():
            values = numbers.standard_normal(shape, np.float32) * np.float32(0.1)
            rows[name] = ("BF16", shape, (values.view(np.uint32) >> 16).astype(np.uint16).tobytes())
        header = json.dumps(header_fields(rows)).encode()
        header += b" " * (-len(header) % 8)
        (directory / shard).write_bytes(file_bytes(header, b"".join(raw for _, _, raw in rows.values())))
    if not single:
        weight_map = {name: shard for shard, shapes in shards.items() for name in shapes}
        (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps({"model_type": "tiny", "tie_word_embeddings": False}))
    (directory / "tokenizer.json").write_text("{}" + " " * 5000)
    return directory


def write_adapters(directory: Path, *, dora: bool, weight: float) -> tuple[tuple[Path, float], ...]:
    """Write two adapters that meet in a tensor, one with a saved module; or two in one file, one of them DoRA."""
    directory.mkdir()
    q, v, k = "model.layers.0.q", "model.layers.0.v", "model.layers.1.k"
    if dora:
        return (
            (_adapter(directory / "plain", 1, [v], {}), weight),
            (_adapter(directory / "dora", 2, [q], {"use_dora": True}), 1.0),
        )
    return (
        (_adapter(directory / "plain", 1, [q, v], {}), weight),
        (_adapter(directory / "saved", 2, [v, k], {"modules_to_save": ["lm_head"]}), 1.0),
    )


def _adapter(directory: Path, seed: int, targets: Sequence[str], settings: Mapping[str, object]) -> Path:
    numbers = np.random.Generator(np.random.PCG64(seed))
    shapes: dict[str, tuple[int, ...]] = {}
    for target in targets:
        rows, columns = SHAPE_OF[f"{target}.weight"]
        shapes |= {f"{target}.lora_A.weight": (2, columns), f"{target}.lora_B.weight": (rows, 2)}
        if settings.get("use_dora"):
            shapes[f"{target}.lora_magnitude_vector"] = (rows,)
    if settings.get("modules_to_save"):
        shapes["lm_head.weight"] = SHAPE_OF["lm_head.weight"]
    weights: Tensors = {}
    for name, shape in shapes.items():
        values = np.abs(numbers.standard_normal(shape)) if name.endswith("vector") else numbers.standard_normal(shape)
        weights[PREFIX + name] = ("F32", shape, (values * 0.2).astype("<f4").tobytes())
    last = sorted(target.rpartition(".")[2] for target in targets)
    return write_adapter(directory, weights=weights, settings=config(target_modules=last, **settings))


def files_of(directory: Path) -> Files:
    """Return every file below a directory, with its bytes."""
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()
    }


def stamps_of(directory: Path) -> dict[str, tuple[int, ...]]:
    """Return what tells whether anything was written, even the same bytes."""
    found = {path.name: path.stat() for path in [directory, *directory.iterdir()]}
    return {name: (s.st_ino, s.st_size, s.st_mtime_ns, s.st_mode, s.st_nlink) for name, s in found.items()}


def loaded(directory: Path) -> Contents | None:
    """Return what a loader finds in a directory: the whole file, or every shard of the index; else nothing.

    What it stops at with an error it does not take for a model: an index that is still empty, say.
    """
    try:
        return _loaded(directory)
    except (json.JSONDecodeError, safetensors.SafetensorError):
        return None


def _loaded(directory: Path) -> Contents | None:
    if (directory / SINGLE).exists():
        shards = {SINGLE}
    elif (directory / INDEX).exists():
        shards = set(json.loads((directory / INDEX).read_bytes())["weight_map"].values())
    else:
        return None
    if not all((directory / shard).exists() for shard in shards):
        return None
    tensors = [row for shard in shards for row in safetensors.deserialize((directory / shard).read_bytes())]
    return {name: (row["dtype"], tuple(row["shape"]), bytes(row["data"])) for name, row in tensors}


def opened(directory: Path) -> Contents | None:
    """Return what this project finds there."""
    try:
        with open_checkpoint(directory) as checkpoint:
            found: Contents = {}
            for name, tensor in checkpoint.tensors.items():
                raw = bytearray(tensor.nbytes)
                checkpoint.read_into(tensor, 0, memoryview(raw))
                found[name] = (tensor.entry.dtype, tensor.entry.shape, bytes(raw))
            return found
    except LoraforgeError:
        return None


@dataclass(frozen=True)
class Truth:
    """A base, its adapters, and what undisturbed commands make of them."""

    base: Path
    merged: Path
    adapters: tuple[tuple[Path, float], ...]
    models: tuple[Contents, ...] = field(repr=False)
    """What a loader may find anywhere: the base's tensors, or the merged ones."""

    def source(self, command: str) -> Path:
        return self.merged if command.startswith("un") else self.base

    def goal(self, command: str) -> Path:
        return self.base if command.startswith("un") else self.merged


def make_truth(
    driver: Driver, directory: Path, *, single: bool = False, dora: bool = False, weight: float = 0.75
) -> Truth:
    """Write a base and adapters, and merge them undisturbed."""
    directory.mkdir()
    base = write_base(directory / "base", single=single)
    adapters = write_adapters(directory / "adapters", dora=dora, weight=weight)
    merged = directory / "merged"
    run = driver.run(Command("merge", base, adapters, merged))
    assert run.done, run.ending
    models = loaded(base), loaded(merged)
    assert models[0] is not None
    assert models[1] is not None
    return Truth(base, merged, adapters, (models[0], models[1]))


@dataclass
class Trial:
    """One command, tried again and again in fresh places, and what was wrong with it."""

    driver: Driver
    truth: Truth
    command: str
    place: Path
    options: Mapping[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    seen: list[Files] = field(default_factory=list)
    """What a second run has ended well from: the same bytes need not be tried again."""

    @property
    def in_place(self) -> bool:
        return self.command.endswith("in_place")

    def fresh(self) -> Command:
        """Return the command in a place where nothing has happened yet."""
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir()
        source = self.truth.source(self.command)
        if self.in_place:
            shutil.copytree(source, self.place / "model")
            return Command(self.command, self.place / "model", self.truth.adapters)
        return Command(self.command, source, self.truth.adapters, self.place / "model")

    def back_to(self, saved: Path) -> Command:
        """Return the command in a place that is as it once was."""
        command = self.fresh()
        shutil.rmtree(self.place)
        shutil.copytree(saved, self.place)
        return command

    def run(self, command: Command, fault: Fault | None = None) -> Run:
        return self.driver.run(command, fault, **self.options)

    def recorded(self) -> Run:
        """Do the command undisturbed."""
        run = self.run(self.fresh())
        assert run.done, run.ending
        self.check_finished("undisturbed")
        return run

    def note(self, when: str, what: str) -> None:
        self.problems.append(f"{when}: {what}")

    def check_killed(self, when: str, run: Run, expected: Run, number: int) -> None:
        """Check that the command was killed where it should have been, and what it has left."""
        if not run.killed or len(run.calls) != number + 1:
            self.note(when, f"it was {run.ending} after {len(run.calls)} calls, not killed before call {number}")
        elif not self.options.get("threads") and run.places != expected.places[: number + 1]:
            self.note(when, "the order of calls was another one")
        self.check_state(when)

    def check_state(self, when: str) -> None:
        """Check that nothing a loader takes for a model is a mixture, and that no input has changed."""
        for found in (self.place, *(path for path in self.place.rglob("*") if path.is_dir())):
            if any(each(found) not in (None, *self.truth.models) for each in (loaded, opened)):
                self.note(when, f"{found.name} is taken for a model, and is neither the base nor the merged one")
        out = self.place / "model"
        if not self.in_place and out.exists() and files_of(out) != files_of(self.truth.goal(self.command)):
            self.note(when, "the output is there, and not complete")

    def check_finished(self, when: str) -> None:
        """Check that all is as after an undisturbed run, and that nothing else is left."""
        self.check_is(when, self.truth.goal(self.command))

    def check_is(self, when: str, goal: Path) -> None:
        """Check that the model is another directory's double, with nothing beside it."""
        found, expected = files_of(self.place), {f"model/{name}": data for name, data in files_of(goal).items()}
        if found != expected:
            differing = sorted(n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n))
            self.note(when, f"other files than an undisturbed run leaves: {differing}")
        elif [path.name for path in self.place.iterdir()] != ["model"]:
            self.note(when, "empty directories are left")

    def finish(self, when: str, command: Command) -> Run:
        """Do the command again, and check that this ends as if nothing had been."""
        whole = command.out is not None and command.out.exists()
        run = self.run(command)
        if whole and not run.raised("ConflictError"):
            self.note(when, f"the output was complete, and the second run was {run.ending}")
        elif not whole and not run.done:
            self.note(when, f"the second run was {run.ending}")
        self.check_finished(when)
        return run


def kill_everywhere(trial: Trial) -> int:
    """Kill a command before each of its calls, look, and do it again; return how many calls there are."""
    stamps = stamps_of(trial.truth.source(trial.command))
    recorded = trial.recorded()
    for number in range(len(recorded.calls)):
        when, command = f"killed before {number}, {recorded.places[number]}", trial.fresh()
        trial.check_killed(when, trial.run(command, Fault("kill", number)), recorded, number)
        trial.finish(when, command)
    if stamps_of(trial.truth.source(trial.command)) != stamps:
        trial.note("after all", "the input has changed")
    return len(recorded.calls)


def kill_twice(trial: Trial, first: int, every: int = 1) -> int:
    """Kill a command before call ``first``, and its second run before each call; return how many these are."""
    command = trial.fresh()
    assert trial.run(command, Fault("kill", first)).killed
    saved = trial.place.with_name(f"{trial.place.name}.saved")
    shutil.copytree(trial.place, saved)
    recorded = trial.run(trial.back_to(saved))
    trial.check_finished(f"killed before {first}")
    for number in range(first % every, len(recorded.calls), every):
        when, command = f"killed before {first}, then before {number}, {recorded.places[number]}", trial.back_to(saved)
        trial.check_killed(when, trial.run(command, Fault("kill", number)), recorded, number)
        trial.finish(when, command)
    shutil.rmtree(saved)
    return len(recorded.calls)


def kill_and_go_back(trial: Trial) -> tuple[int, int]:
    """Kill an in-place command before each call, then do the opposite; return how many calls, and how often it could.

    Where the command had not begun to write, there may be nothing to take back: then the opposite says so, and the
    model is the one it was.
    """
    recorded, possible = trial.recorded(), 0
    source = trial.truth.source(trial.command)
    refusal = "ConflictError" if trial.command.startswith("un") else "NotFoundError"
    for number in range(len(recorded.calls)):
        when, command = f"killed before {number}, {recorded.places[number]}, then taken back", trial.fresh()
        trial.check_killed(when, trial.run(command, Fault("kill", number)), recorded, number)
        run = trial.run(command.opposite)
        possible += run.done
        if run.done:
            trial.check_is(when, source)
        elif not run.raised(refusal) or (command.model / JOURNAL).exists():
            trial.note(when, f"it was {run.ending}")
        elif files_of(source).items() - files_of(command.model).items():
            trial.note(when, "it was refused, and the model is not the one it was")
        trial.check_state(when)
    return len(recorded.calls), possible


def cut_everywhere(trial: Trial) -> int:
    """Cut every write off at each end of a page in it, then do the command again; return how many cuts there were."""
    recorded, cuts = trial.recorded(), 0
    for number, call in enumerate(recorded.calls):
        if call["call"] != "pwrite":
            continue
        for size in _cuts(call, in_place=trial.in_place):
            when, command = f"write {number}, {recorded.places[number]}, cut off after {size} bytes", trial.fresh()
            trial.check_killed(when, trial.run(command, Fault("cut", number, size=size)), recorded, number)
            trial.finish(when, command)
            cuts += 1
    return cuts


def _cuts(call: Mapping[str, Any], *, in_place: bool) -> list[int]:
    """Where a write may stop: a page of a model's file is written whole or not at all, other files end anywhere."""
    position, size = call["position"], call["size"]
    found = list(range(PAGE - position % PAGE, size, PAGE))
    model = ".safetensors" in Path(call["path"]).name
    return found if in_place and model else sorted({*found, 1, size // 2, size - 1} - {0, size})


def fail_everywhere(trial: Trial, number: int, *, lasting: bool) -> int:
    """Let each call of a command raise (from then on, if ``lasting``); return how many calls there are."""
    stamps = stamps_of(trial.truth.source(trial.command))
    recorded = trial.recorded()
    for at in range(len(recorded.calls)):
        when, command = f"error {number} at {at}, {recorded.places[at]}", trial.fresh()
        run = trial.run(command, Fault("error", at, number=number, lasting=lasting))
        named = run.error is not None and str(trial.place) in run.error["text"]
        if not run.raised("InputOutputError") or not run.raised("LoraforgeError") or not named:
            trial.note(when, f"it was {run.ending}")
        trial.check_state(when)
        last = at == len(recorded.calls) - 1
        if not trial.in_place and recorded.places[at][0] not in ("unlink", "rmdir") and not last:
            left = [path.name for path in trial.place.iterdir()]
            if left:
                trial.note(when, f"it left {left}")
        trial.finish(when, command)
    if stamps_of(trial.truth.source(trial.command)) != stamps:
        trial.note("after all", "the input has changed")
    return len(recorded.calls)


def not_durable(runs: Sequence[Run]) -> list[str]:
    """Return what was given its last name, or lost its journal, before all of its bytes were asked to the disk.

    ``runs`` follow each other in one place. The last call of one that was killed did not happen, and a call that
    raised did not, either.
    """
    found: list[str] = []
    dirty: dict[int, str] = {}
    for run in runs:
        for call in run.calls[: len(run.calls) - (not run.done)]:
            name, path, inodes = call["call"], call["path"], call.get("inodes", [])
            if name in ("pwrite", "copy_file_range", "posix_fallocate", "ftruncate"):
                dirty |= dict.fromkeys(inodes, path)
            elif name in ("fsync", "unlink"):
                for inode in inodes:
                    dirty.pop(inode, None)
            elif name == "rename" and not call["target"].endswith((".part", ".merging")):
                found += [f"{dirty[i]} becomes {call['target']} before an fsync" for i in inodes if i in dirty]
            if name == "unlink" and path.endswith(JOURNAL):
                found += [f"the journal goes before an fsync of {each}" for each in dirty.values()]
    return found
