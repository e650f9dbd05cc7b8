"""The values: an adapter, its low-rank pairs, its base. Immutable in, new value out."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from loraforge.errors import NumericalError
from loraforge_registry.config import Settings, scale_of
from loraforge_registry.manifest import Artifact, Derivation

Kind = Literal["linear", "embedding", "conv1d", "conv2d", "conv3d"]


@dataclass(frozen=True)
class LowRank:
    """The factors of one target, as PEFT keeps them; ``scale * B @ A`` is its update.

    Shapes: Linear and Conv1D a (r, in), b (out, r). Embedding a (r, rows), b (dim, r). Convolutions
    a (r, in, *kernel), b (out, r, 1, ...). ``bias`` (out,) is added to B's output; ``magnitude`` is DoRA's, one
    number an output.
    """

    kind: Kind
    a: Tensor
    b: Tensor
    alpha: float
    rslora: bool = False
    bias: Tensor | None = None
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """The rank of the factors, r."""
        return self.a.shape[0]

    @property
    def scale(self) -> float:
        """``alpha / r``, or ``alpha / sqrt(r)`` with rsLoRA."""
        return scale_of(self.alpha, self.rank, rslora=self.rslora)

    @property
    def groups(self) -> int:
        """The groups of a grouped convolution, whose B sees r / groups rows of A; else 1."""
        return self.a.shape[0] // self.b.shape[1]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the update: (out, in), (rows, dim) for an embedding, (out, in, *kernel)."""
        if self.kind == "embedding":
            return (self.a.shape[1], self.b.shape[0])
        return (self.b.shape[0], *self.a.shape[1:])

    @property
    def matrices(self) -> tuple[Tensor, Tensor]:
        """The factors as matrices: a (r, n), b (m, r), with n = in * kernel elements for a convolution."""
        return self.a.flatten(1), self.b.flatten(1)

    @property
    def parameters(self) -> int:
        """The number of elements of both factors."""
        return self.a.numel() + self.b.numel()

    def delta(self) -> Tensor:
        """Return the dense update ``scale * B @ A`` in the shape of the weight.

        Shapes: -> ``self.shape``; for a transformers Conv1D the weight's transpose.
        Numerics: float64, from the factors as they are.
        Cost: out * in * r multiply-adds, and a dense float64 matrix: for tests and small modules.
        """
        a, b = (m.to(torch.float64) for m in self.matrices)
        dense = self.scale * (b @ a)
        return dense.T if self.kind == "embedding" else dense.reshape(self.shape)

    def check_finite(self, target: str) -> None:
        """Refuse NaN and infinity.

        Raises:
            NumericalError: naming the target, the factor and the first index.
        """
        for name, tensor in (("A", self.a), ("B", self.b), ("bias", self.bias)):
            # a sum hides neither NaN nor infinity, and costs a tenth; where it overflows the exact check decides
            if tensor is None or math.isfinite(float(tensor.sum())):
                continue
            if not bool(torch.isfinite(tensor).all()):
                index = torch.nonzero(~torch.isfinite(tensor))[0].tolist()
                raise NumericalError(f"target {target!r}: {name} holds {float(tensor[tuple(index)])} at {index}")


@dataclass(frozen=True)
class BaseModel:
    """The base an adapter says it belongs to: labels from its config, not proof."""

    name: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class Adapter:
    """A set of low-rank updates by target, what PEFT lets travel along, and where it all came from.

    ``extras`` are whole tensors by key (saved modules, biases of the base, token rows): they replace what the base
    has. ``origin`` is the artifact it was loaded from, if any; ``derivation`` how it was made, if it was.
    """

    targets: Mapping[str, LowRank]
    settings: Settings = field(default_factory=Settings)
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    origin: Artifact | None = None
    derivation: Derivation | None = None

    @property
    def base(self) -> BaseModel:
        """The base it says it belongs to."""
        return BaseModel(self.settings.base_name, self.settings.base_revision)

    @property
    def parameters(self) -> int:
        """The number of elements of all factors."""
        return sum(pair.parameters for pair in self.targets.values())
