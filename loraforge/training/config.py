"""Everything a run depends on but the model and the data."""

import math
from dataclasses import dataclass
from typing import Literal

from loraforge.errors import TrainingError
from loraforge.layers import LoraConfig

Schedule = Literal["constant", "linear", "cosine"]
SCHEDULES: tuple[Schedule, ...] = ("constant", "linear", "cosine")
Precision = Literal["auto", "fp32", "bf16"]
PRECISIONS: tuple[Precision, ...] = ("auto", "fp32", "bf16")


@dataclass(frozen=True)
class TrainConfig(LoraConfig):
    """What to adapt (the fields of ``LoraConfig``) and how to train it.

    A step is one update from ``grad_accum`` micro-batches. ``max_steps`` overrides ``epochs``. ``warmup`` is a number
    of steps, or below 1 a share of them. ``loraplus_ratio`` multiplies the rate of the B factors (arXiv:2402.12354).
    ``max_grad_norm`` of 0 does not clip. ``patience`` evaluations without a better loss end the run.
    ``compile`` runs the model through ``torch.compile``; ``shard`` shares the base out over the processes of a run.

    Raises:
        TrainingError: a value out of range; the field is named.
        TargetError: the same of a field of ``LoraConfig``.
    """

    lr: float = 2e-4
    epochs: int = 1
    max_steps: int | None = None
    grad_accum: int = 1
    schedule: Schedule = "linear"
    warmup: float = 0.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    loraplus_ratio: float = 1.0
    precision: Precision = "auto"
    device: str = "auto"
    grad_checkpoint: bool = False
    compile: bool = False
    shard: bool = False
    seed: int = 0
    eval_every: int | None = None
    patience: int | None = None
    save_every: int | None = None
    keep: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("lr", "eps", "loraplus_ratio"):
            _check(0 < getattr(self, name) < math.inf, name, getattr(self, name), "a number above 0")
        for name in ("weight_decay", "max_grad_norm", "warmup"):
            _check(0 <= getattr(self, name) < math.inf, name, getattr(self, name), "a number from 0")
        for name in ("epochs", "grad_accum", "keep", "max_steps", "eval_every", "patience", "save_every"):
            value = getattr(self, name)
            optional = value is None and name not in ("epochs", "grad_accum", "keep")
            _check(optional or (isinstance(value, int) and value >= 1), name, value, "a whole number from 1")
        _check(all(0 <= beta < 1 for beta in self.betas), "betas", self.betas, "two numbers from 0 to below 1")
        _check(self.schedule in SCHEDULES, "schedule", self.schedule, f"one of {', '.join(SCHEDULES)}")
        _check(self.precision in PRECISIONS, "precision", self.precision, f"one of {', '.join(PRECISIONS)}")
        object.__setattr__(self, "betas", tuple(self.betas))
        if self.compile and self.dropout:
            raise TrainingError(
                "compile and dropout exclude each other (masks are drawn outside of torch): leave one out"
            )
        if self.compile and self.shard:
            raise TrainingError("compile and shard exclude each other: leave one out")


def _check(fine: bool, name: str, value: object, expected: str) -> None:  # noqa: FBT001 - what is checked
    if not fine:
        raise TrainingError(f"{name} is {value!r}, expected {expected}")
