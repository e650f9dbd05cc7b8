"""A run on disk: checkpoints that appear complete or not at all, and a line of metrics for each step.

    RUN/step-0000010/adapter_config.json, adapter_model.safetensors    the adapter as it was: any tool loads it
    RUN/step-0000010/state.safetensors                                 parameters and moments, bit for bit
    RUN/step-0000010/state.json                                        where the run stood, and its configuration
    RUN/metrics.jsonl

Nothing is pickled. Random numbers and the learning rate are functions of the step, so there is no more state than this.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loraforge.adapter import Adapter, raw_bytes
from loraforge.adapter.mapped import map_tensors
from loraforge.adapter.tensors import dtype_name
from loraforge.errors import FormatError, StoreError, TrainingError
from loraforge.formats import peft
from loraforge.training.batches import Cursor
from loraforge.training.config import TrainConfig
from loraforge_registry.export import write_directory
from loraforge_registry.header import encode_header, parse_header, read_header
from loraforge_registry.manifest import CONFIG_FILE, WEIGHTS_FILE
from loraforge_registry.system import Buffer

STATE, TENSORS, METRICS = "state.json", "state.safetensors", "metrics.jsonl"
_FREE = frozenset({"device", "keep", "save_every", "shard"})
"""Fields that a resumed run may change: they do not say what is computed."""


@dataclass(frozen=True)
class Progress:
    """Where a run stands after ``step`` steps; ``best`` is the best evaluation, ``stale`` how many were no better."""

    step: int = 0
    cursor: Cursor = field(default_factory=Cursor)
    best: float | None = None
    stale: int = 0


@dataclass(frozen=True)
class Setting:
    """What a resumed run must have as it was: its configuration, and what names its model and data."""

    config: TrainConfig
    inputs: Mapping[str, object]

    def plain(self) -> dict[str, Any]:
        """Return it as JSON gives it back."""
        config = {name: value for name, value in asdict(self.config).items() if name not in _FREE}
        plain: dict[str, Any] = json.loads(json.dumps(config | {f"inputs.{k}": v for k, v in self.inputs.items()}))
        return plain


Tensors = dict[str, Tensor]


def save(run: Path, progress: Progress, setting: Setting, adapter: Adapter, tensors: Mapping[str, Tensor]) -> Path:
    """Write the checkpoint of a step, and drop all but the last few.

    Raises:
        InputOutputError: it cannot be written; nothing of it is left.
    """
    encoded = peft.encode(adapter)
    document = {"setting": setting.plain(), **asdict(progress)}
    contents: dict[str, Callable[[], Iterable[Buffer]]] = {
        CONFIG_FILE: lambda: [encoded.config],
        WEIGHTS_FILE: lambda: encoded.chunks,
        TENSORS: lambda: safetensors(tensors),
        STATE: lambda: [(json.dumps(document, indent=2, sort_keys=True) + "\n").encode()],
    }
    folder = run / f"step-{progress.step:07}"
    if not folder.exists():
        write_directory(folder, contents)
    for old in checkpoints(run)[: -setting.config.keep]:
        drop(old)
    return folder


def checkpoints(run: Path) -> list[Path]:
    """Return the complete checkpoints of a run, the oldest first."""
    return sorted(path for path in run.glob("step-*") if (path / STATE).is_file())


def load(folder: Path, setting: Setting) -> tuple[Progress, Tensors]:
    """Read a checkpoint.

    Raises:
        TrainingError: it is of a run with another configuration, model or data; what differs is named.
        StoreError: it is damaged.
    """
    try:
        document = json.loads((folder / STATE).read_text())
        with (folder / TENSORS).open("rb") as file:
            tensors = map_tensors(file.fileno(), read_header(file.fileno()))
        before, cursor = document["setting"], Cursor(**document["cursor"])
        progress = Progress(document["step"], cursor, document["best"], document["stale"])
    except (OSError, ValueError, KeyError, TypeError, FormatError) as error:
        raise StoreError(
            f"{folder} is no checkpoint that can be read ({error}); remove it to go on from the one before"
        ) from error
    now = setting.plain()
    for name in sorted(now.keys() | before.keys()):
        if before.get(name) != now.get(name):
            raise TrainingError(
                f"{folder.parent} was begun with {name}={before.get(name)!r}, now it is {now.get(name)!r}: resume with "
                "what it was, or name another run directory"
            )
    return progress, tensors


def tidy(run: Path, step: int, key: str = "step") -> None:
    """Remove what a killed run left: unfinished checkpoints, and metrics whose ``key`` is after ``step``."""
    for left in (*run.glob(".step-*"), *run.glob(".old-*")):
        shutil.rmtree(left, ignore_errors=True)
    path = run / METRICS
    if path.exists():
        lines = [line for line in path.read_text().splitlines() if _number_in(line, key) <= step]
        temporary = run / f".{METRICS}"
        temporary.write_text("".join(line + "\n" for line in lines))
        temporary.replace(path)


def log(run: Path, line: Mapping[str, object]) -> None:
    """Append a line of metrics."""
    with (run / METRICS).open("a") as file:
        file.write(json.dumps(line) + "\n")


def gather(
    parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, fixed: Mapping[str, Tensor], best: Tensors
) -> Tensors:
    """Return every tensor that a run needs to go on, by name."""
    found = named(parameters, fixed) | {f"best/{name}": tensor for name, tensor in best.items()}
    for name, parameter in parameters.items():
        found |= {f"{key}/{name}": value for key, value in optimizer.state[parameter].items()}
    return found


def named(parameters: Mapping[str, nn.Parameter], fixed: Mapping[str, Tensor]) -> Tensors:
    """Return an adapter's tensors by the names they have in a checkpoint."""
    found = {f"parameter/{name}": parameter.detach() for name, parameter in parameters.items()}
    return found | {f"fixed/{name}": tensor for name, tensor in fixed.items()}


def scatter(
    tensors: Tensors,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    fixed: Mapping[str, Tensor],
) -> Tensors:
    """Put back what ``gather`` returned, and return the best parameters.

    Raises:
        TrainingError: the tensors are of another model.
    """
    mine = {f"parameter/{name}": parameter for name, parameter in parameters.items()}
    theirs = {name: tensor for name, tensor in tensors.items() if name.startswith("parameter/")}
    if {n: t.shape for n, t in mine.items()} != {n: t.shape for n, t in theirs.items()}:
        odd = sorted(mine.keys() ^ theirs.keys()) or sorted(mine)
        raise TrainingError(f"the checkpoint is of another model: {odd[0].removeprefix('parameter/')!r} does not agree")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"parameter/{name}"])
            state = {key: tensors[f"{key}/{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {key: _moved(key, value, parameter) for key, value in state.items()}
        for name, tensor in fixed.items():
            tensor.copy_(tensors[f"fixed/{name}"])
    return {name.removeprefix("best/"): tensor.clone() for name, tensor in tensors.items() if name.startswith("best/")}


def _moved(key: str, value: Tensor, parameter: nn.Parameter) -> Tensor:
    """A copy where the optimizer keeps it: fused AdamW has its step count on the device, too."""
    device = parameter.device if key != "step" or parameter.device.type == "cuda" else torch.device("cpu")
    return value.to(device, copy=True)


def safetensors(tensors: Mapping[str, Tensor]) -> Iterable[Buffer]:
    """Yield the bytes of a safetensors file."""
    start = encode_header((name, dtype_name(tensor), tuple(tensor.shape)) for name, tensor in sorted(tensors.items()))
    size = len(start) + sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
    yield start
    for entry in parse_header(start[8:], size).tensors:
        yield raw_bytes(tensors[entry.name])


def drop(folder: Path) -> None:
    """Remove a checkpoint in two steps, so that a killed run leaves none that is half there."""
    hidden = folder.with_name(f".old-{folder.name}")
    folder.rename(hidden)
    shutil.rmtree(hidden)


def _number_in(line: str, key: str) -> float:
    try:
        return float(json.loads(line)[key])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line that was cut off
