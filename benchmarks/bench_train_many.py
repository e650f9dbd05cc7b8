"""What do eight adapters at once on one base cost, beside eight runs one after another?

One Llama (512 wide, 6 layers) with random weights, all-linear, rank 8, no dropout: whole steps (gradients, clipping,
AdamW) of eight adapters, each on its own tokens. Once all rows go through one base together, once each adapter has its
own copy of the base, as eight runs would. One thread, its CPU time, the two in turns, the least of the rounds.

Held is what storages of weights (under autocast with their copies), factors, gradients and moments take after a step,
each storage counted once. The
largest relative difference of an adapter's gradient between the two ways is in the last column.

To reach: at 64 tokens an adapter at least 1.2 times the throughput; a third of what is held; gradients within 1e-6.

    python benchmarks/bench_train_many.py [--rounds N]
"""

import copy
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from bench_train import VOCABULARY, make_base  # type: ignore[import-not-found]  # a script beside this one
from torch import Tensor

from loraforge.layers import inject, narrow
from loraforge.layers.shared import Shared
from loraforge.training import TrainConfig
from loraforge.training.batches import Cursor, Window, count_labels
from loraforge.training.loop import Plan, Run, make_run, update
from loraforge.training.step import window_gradient
from loraforge.training.together import Turn, Way, together

ADAPTERS, RANK = 8, 8
CONFIG = TrainConfig(rank=RANK, schedule="constant")
PLAN = Plan(None, None)
SHAPES = ((1, 64), (2, 64), (4, 64), (4, 128))


def main() -> int:
    """Print the table."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rounds = int(sys.argv[sys.argv.index("--rounds") + 1]) if "--rounds" in sys.argv else 8
    base = make_base()
    held_header = f"{'held MB':>9}{'alone':>7}{'ratio':>7}{'|dg|/|g|':>10}"
    print(f"{'8 steps, 1 thread':28}{'at once':>9}{'alone':>8}{'ratio':>7}{held_header}")
    for half in (False, True):
        autocast = torch.bfloat16 if half else None
        for rows, length in SHAPES:
            batches = [make_batch(number, rows, length) for number in range(ADAPTERS)]
            group, alone = Group(copy.deepcopy(base), autocast), Alone(base, autocast)
            seconds = measure([partial(group.step, batches), partial(alone.step, batches)], rounds)
            held = [bytes_of(one.tensors()) for one in (group, alone)]
            apart = gap(Group(copy.deepcopy(base), autocast), Alone(base, autocast), batches)  # of the first step
            name = f"{'bf16 autocast' if half else 'float32'}, {rows} x {length} tokens"
            print(
                f"{name:28}{seconds[0] * 1e3:7.0f}ms{seconds[1] * 1e3:8.0f}{seconds[1] / seconds[0]:7.2f}"
                f"{held[0] / 1e6:9.0f}{held[1] / 1e6:7.0f}{held[1] / held[0]:7.2f}{apart:10.1e}"
            )
    return 0


class Group:
    """Eight adapters in one model."""

    def __init__(self, model: Any, autocast: torch.dtype | None) -> None:  # noqa: ANN401 - transformers' models have no types here
        self.model, self.shared = model, Shared(model)
        self.runs: list[Run] = []
        for number in range(ADAPTERS):
            torch.manual_seed(number)
            self.runs.append(awake(make_run(self.shared.join(str(number), CONFIG), CONFIG)))
        self.narrow = narrow(model, autocast)
        self.way = Way(model, self.shared, count_labels, autocast)

    def gradients(self, batches: Sequence[Any]) -> list[tuple[float, int]]:
        """Compute all gradients in one pass."""
        for run in self.runs:
            run.optimizer.zero_grad(set_to_none=True)
        turns = [Turn(str(number), [batch], number, 0) for number, batch in enumerate(batches)]
        return list(together(self.way, turns).values())

    def step(self, batches: Sequence[Any]) -> None:
        """Take one step of each."""
        take(self.runs, batches, self.gradients(batches))

    def tensors(self) -> Iterable[Tensor]:
        """Everything that is held."""
        return [*self.model.parameters(), *self.narrow, *(tensor for run in self.runs for tensor in state(run))]


class Alone:
    """Eight models, each with an adapter."""

    def __init__(self, base: Any, autocast: torch.dtype | None) -> None:  # noqa: ANN401 - as above
        self.models = [copy.deepcopy(base) for _ in range(ADAPTERS)]
        self.autocast = autocast
        self.runs: list[Run] = []
        self.narrow: list[Tensor] = []
        for number, model in enumerate(self.models):
            torch.manual_seed(number)
            self.runs.append(awake(make_run(inject(model, CONFIG), CONFIG)))
            self.narrow += narrow(model, autocast)

    def gradients(self, batches: Sequence[Any]) -> list[tuple[float, int]]:
        """Compute one gradient after another."""
        found = []
        for model, run, batch in zip(self.models, self.runs, batches, strict=True):
            run.optimizer.zero_grad(set_to_none=True)
            found.append(window_gradient(model, [batch], count_labels, self.autocast))
        return found

    def step(self, batches: Sequence[Any]) -> None:
        """Take one step of each."""
        take(self.runs, batches, self.gradients(batches))

    def tensors(self) -> Iterable[Tensor]:
        """Everything that is held."""
        own = (parameter for model in self.models for parameter in model.parameters())
        return [*own, *self.narrow, *(tensor for run in self.runs for tensor in state(run))]


def awake(run: Run) -> Run:
    """Give B values: where it is zero, A has no gradient."""
    with torch.no_grad():
        for name, parameter in run.parameters.items():
            if name.endswith(".b"):
                parameter.normal_(std=0.02)
    return run


def take(runs: Sequence[Run], batches: Sequence[Any], found: Sequence[tuple[float, int]]) -> None:
    """Clip, and let AdamW step."""
    for run, batch, (loss, tokens) in zip(runs, batches, found, strict=True):
        update(run, Window([batch], Cursor()), CONFIG, PLAN, loss, tokens)


def state(run: Run) -> list[Tensor]:
    """Factors, gradients and moments."""
    found: list[Tensor] = []
    for parameter in run.parameters.values():
        found += [parameter, *([] if parameter.grad is None else [parameter.grad])]
        found += [value for value in run.optimizer.state[parameter].values() if isinstance(value, Tensor)]
    return found


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """The bytes of all storages, each counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def gap(group: Group, alone: Alone, batches: Sequence[Any]) -> float:
    """The largest relative difference of an adapter's whole gradient."""
    group.gradients(batches)
    alone.gradients(batches)
    worst = 0.0
    for one, two in zip(group.runs, alone.runs, strict=True):
        ours, theirs = (
            torch.cat([p.grad.flatten() for p in run.parameters.values() if p.grad is not None]) for run in (one, two)
        )
        worst = max(worst, float((ours - theirs).norm() / theirs.norm()))
    return worst


def measure(works: Sequence[Callable[[], None]], rounds: int) -> list[float]:
    """Return the least CPU seconds of each, taken in turns after one round to warm up."""
    best = [float("inf")] * len(works)
    for number in range(rounds + 1):
        for place, work in enumerate(works):
            start = time.thread_time()
            work()
            best[place] = min(best[place], time.thread_time() - start) if number else best[place]
    return best


def make_batch(seed: int, rows: int, length: int) -> dict[str, Tensor]:
    """Return tokens, all of them labels."""
    ids = torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


if __name__ == "__main__":
    sys.exit(main())
