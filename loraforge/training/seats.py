"""Adapters that are trained side by side: what each brings, where it stands, and how it ended."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from loraforge.adapter import Adapter
from loraforge.errors import LoraforgeError
from loraforge.training.batches import Batch, Window
from loraforge.training.checkpoints import Setting
from loraforge.training.config import TrainConfig
from loraforge.training.loop import Plan, Run


@dataclass(frozen=True)
class Member:
    """One adapter to train beside others; the first two are what ``train`` is given.

    ``valid``, ``adapter`` and ``inputs`` are as for ``train``. It joins after ``joins`` rounds. Members of one
    ``contest`` compete under successive halving, by their loss on ``valid``, which must be the same data.
    """

    batches: Iterable[Batch]
    config: TrainConfig = field(default_factory=TrainConfig)
    valid: Iterable[Batch] | None = None
    adapter: Adapter | None = None
    inputs: Mapping[str, object] = field(default_factory=dict)
    joins: int = 0
    contest: str | None = None


@dataclass(frozen=True)
class Dropped:
    """After how many steps one lost its contest, and its loss then."""

    step: int
    loss: float


@dataclass
class Seat:
    """One adapter's place: waiting without a run, then with one, then with its adapter, an error, or dropped.

    ``kept`` are the tensors of one that is done, by the names of a checkpoint.
    """

    name: str
    member: Member
    plan: Plan
    run: Run | None = None
    coming: Iterator[Window] | None = None
    adapter: Adapter | None = None
    error: LoraforgeError | None = None
    dropped: Dropped | None = None
    kept: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def now(self) -> Run:
        """The run of one that is there."""
        assert self.run is not None, "only those that are there take steps"  # noqa: S101 - the group's contract
        return self.run

    @property
    def ended(self) -> bool:
        """Whether it has no steps before it."""
        return self.adapter is not None or self.error is not None or self.dropped is not None

    @property
    def is_saving(self) -> bool:
        """Whether a checkpoint is due for it."""
        every = self.member.config.save_every
        return self.run is not None and every is not None and self.run.progress.step % every == 0

    def setting(self) -> dict[str, Any]:
        """Return what a resumed run must have as it was."""
        member = self.member
        return Setting(member.config, {**member.inputs, "joins": member.joins, "contest": member.contest}).plain()

    def gradients(self) -> list[Tensor]:
        """Return the gradient of every parameter, zeros where there is none."""
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in self.now.parameters.values()]

    def put_back(self, gradients: Iterable[Tensor]) -> None:
        """Give parameters other gradients; one that nothing reached keeps none, to be found."""
        for parameter, gradient in zip(self.now.parameters.values(), gradients, strict=True):
            if parameter.grad is not None:
                parameter.grad = gradient

    def clear(self) -> None:
        """Forget the gradients."""
        self.now.optimizer.zero_grad(set_to_none=True)
