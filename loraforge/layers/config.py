"""What to adapt and how: the settings of an injection, checked when they are made."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from loraforge.errors import TargetError
from loraforge_registry.config import BIAS_MODES, scale_of

Init = Literal["kaiming", "gaussian", "pissa", "olora"]
INITS: tuple[Init, ...] = ("kaiming", "gaussian", "pissa", "olora")
FACTORISED: frozenset[Init] = frozenset({"pissa", "olora"})
"""Initialisations that start from factors of the base weight, and leave the function of the model as it was."""


@dataclass(frozen=True)
class LoraConfig:
    """Where low-rank updates go and how they start; names and meanings are PEFT's.

    ``targets`` is a list of path ends, one regular expression for whole paths, ``"all-linear"`` (every linear module
    but the output head) or ``"attention"`` (every linear module below one whose name has "attn" or "attention").
    ``alpha`` is twice the rank unless given. Keys of the patterns are found as PEFT finds them.

    Raises:
        TargetError: a value out of range, or options that exclude each other; the field is named.
    """

    rank: int = 8
    alpha: float | None = None
    targets: str | tuple[str, ...] = "all-linear"
    exclude: str | tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    lora_bias: bool = False
    init: Init = "kaiming"
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()
    bias: str = "none"
    task_type: str | None = None

    def __post_init__(self) -> None:
        for name in ("targets", "exclude", "layers", "modules_to_save"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        for name, rank in {"rank": self.rank, **self.rank_pattern}.items():
            _check(isinstance(rank, int) and rank >= 1, name, rank, "a whole number from 1")
        for name, alpha in {"alpha": self.alpha, **self.alpha_pattern}.items():
            _check(alpha is None or (alpha != 0 and math.isfinite(alpha)), name, alpha, "a number that is not 0")
        _check(0 <= self.dropout < 1, "dropout", self.dropout, "at least 0 and below 1")
        _check(self.init in INITS, "init", self.init, f"one of {', '.join(INITS)}")
        _check(self.bias in BIAS_MODES, "bias", self.bias, f"one of {', '.join(BIAS_MODES)}")
        _check(bool(self.targets), "targets", self.targets, "at least one name")
        if self.layers is not None and isinstance(self.targets, str):
            raise TargetError(f"layers go with a list of targets; targets is {self.targets!r}, which says itself which")
        if self.dora and (self.lora_bias or self.init in FACTORISED):
            other = "lora_bias" if self.lora_bias else f"init={self.init!r}"
            raise TargetError(f"dora and {other} exclude each other: leave one of them out")

    @property
    def default_alpha(self) -> float:
        """``alpha``, or twice the rank."""
        return 2.0 * self.rank if self.alpha is None else self.alpha

    def scale(self, alpha: float, rank: int) -> float:
        """Return what multiplies ``B @ A``."""
        return scale_of(alpha, rank, rslora=self.rslora)


def _check(fine: bool, name: str, value: object, expected: str) -> None:  # noqa: FBT001 - what is checked
    if not fine:
        raise TargetError(f"{name} is {value!r}, expected {expected}")
