"""A run of several adapters on disk: one checkpoint of all, which appears complete or not at all.

    RUN/step-0000010/state.safetensors    N/parameter/..., N/exp_avg/...: what ``checkpoints.gather`` says of seat N
    RUN/step-0000010/state.json           the round; of each seat its setting, and where it stands or how it ended
    RUN/metrics.jsonl                     a line for each adapter and round

Of an adapter that is done only its factors are kept, of one that failed or was dropped nothing but that.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from loraforge.adapter.mapped import map_tensors
from loraforge.errors import FormatError, NumericalError, StoreError, TrainingError
from loraforge.training import checkpoints
from loraforge.training.batches import Cursor
from loraforge.training.checkpoints import STATE, TENSORS, Progress, Tensors
from loraforge.training.loop import checked
from loraforge.training.seats import Dropped, Seat
from loraforge_registry.export import write_directory
from loraforge_registry.header import read_header

_GROUP = "seats"


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was read: the round, why adapters take turns if they do, and what there is of each seat."""

    number: int
    apart: str | None
    seats: Sequence[Mapping[str, Any]]
    tensors: Tensors


def save(run: Path, seats: Sequence[Seat], number: int, apart: str | None, common: Mapping[str, object]) -> None:
    """Write the checkpoint of a round, and drop all but the last few.

    Raises:
        InputOutputError: it cannot be written; nothing of it is left.
    """
    document = {"number": number, "apart": apart, "common": common, _GROUP: [_plain(seat) for seat in seats]}
    text = (json.dumps(document, indent=2, sort_keys=True) + "\n").encode()
    tensors = {f"{place}/{key}": tensor for place, seat in enumerate(seats) for key, tensor in _tensors(seat).items()}
    folder = run / f"step-{number:07}"
    if not folder.exists():
        write_directory(folder, {TENSORS: lambda: checkpoints.safetensors(tensors), STATE: lambda: [text]})
    for old in checkpoints.checkpoints(run)[: -max(seat.member.config.keep for seat in seats)]:
        checkpoints.drop(old)


def find(run: Path, seats: Sequence[Seat], common: Mapping[str, object], *, resume: bool) -> Saved | None:
    """Read the last checkpoint of a run, if it has one.

    Raises:
        TrainingError: there is one and it is not to be resumed, or it is of other adapters or settings.
        StoreError: it is damaged.
    """
    run.mkdir(parents=True, exist_ok=True)
    found = checkpoints.checkpoints(run)
    if not found:
        return None
    if not resume:
        raise TrainingError(f"{run} holds a run already, up to {found[-1].name}: resume it, or name another directory")
    try:
        document = json.loads((found[-1] / STATE).read_text())
        with (found[-1] / TENSORS).open("rb") as file:
            tensors = map_tensors(file.fileno(), read_header(file.fileno()))
        saved = Saved(document["number"], document["apart"], document[_GROUP], tensors)
        before = [{"name": seat["name"], **document["common"], **seat["setting"]} for seat in saved.seats]
    except (OSError, ValueError, KeyError, TypeError, FormatError) as error:
        raise StoreError(
            f"{found[-1]} is no checkpoint of several adapters that can be read ({error}); remove it to go on from the "
            "one before, or name another run directory"
        ) from error
    _compare(run, before, [{"name": seat.name, **common, **seat.setting()} for seat in seats])
    return saved


def restore(seat: Seat, place: int, saved: Saved) -> None:
    """Put a seat, whose run has begun if it is to, where the checkpoint has it."""
    document, run = saved.seats[place], seat.run
    start = f"{place}/"
    tensors = {key.removeprefix(start): t for key, t in saved.tensors.items() if key.startswith(start)}
    if document["dropped"] is not None:
        seat.dropped = Dropped(**document["dropped"])
    elif document["error"] is not None:
        seat.error = NumericalError(document["error"])
    elif document["done"]:
        with torch.no_grad():
            for key, tensor in checkpoints.named(seat.now.parameters, seat.now.fixed).items():
                tensor.copy_(tensors[key])
        seat.adapter, seat.kept = checked(seat.now.injected.adapter()), tensors
    elif run is not None:
        run.progress = Progress(**{**document["progress"], "cursor": Cursor(**document["progress"]["cursor"])})
        run.best = checkpoints.scatter(tensors, run.parameters, run.optimizer, run.fixed)


def is_there(document: Mapping[str, Any]) -> bool:
    """Whether a seat had factors in a checkpoint."""
    return bool(document["done"]) or document["progress"] is not None


def _plain(seat: Seat) -> dict[str, Any]:
    return {
        "name": seat.name,
        "setting": seat.setting(),
        "done": seat.adapter is not None,
        "error": None if seat.error is None else str(seat.error),
        "dropped": None if seat.dropped is None else asdict(seat.dropped),
        "progress": None if seat.run is None else asdict(seat.run.progress),
    }


def _tensors(seat: Seat) -> Mapping[str, torch.Tensor]:
    run = seat.run
    if run is None:
        return seat.kept
    return checkpoints.gather(run.parameters, run.optimizer, run.fixed, run.best)


def _compare(run: Path, before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> None:
    names = [[seat["name"] for seat in seats] for seats in (before, now)]
    if names[0] != names[1]:
        raise TrainingError(
            f"{run} was begun with the adapters {', '.join(names[0])}, now they are {', '.join(names[1])}: resume with "
            "what it was, or name another run directory"
        )
    for old, new in zip(before, json.loads(json.dumps(now)), strict=True):
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                raise TrainingError(
                    f"{run} was begun with {key}={old.get(key)!r} for {new['name']}, now it is {new.get(key)!r}: "
                    "resume with what it was, or name another run directory"
                )
