"""Two checkpoints of one model, read side by side, one tensor at a time."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from blake3 import blake3
from torch import Tensor

from loraforge.adapter import DTYPES
from loraforge.checkpoint.reader import Checkpoint, TensorAt, open_checkpoint
from loraforge.checkpoint.receipt import checkpoint_digest
from loraforge.checkpoint.sketch import pieces
from loraforge.checkpoint.workspace import Workspace
from loraforge.errors import CompositionError, NumericalError
from loraforge_registry.digest import Digest
from loraforge_registry.paths import AnyPath

FLOATS = frozenset({"BF16", "F16", "F32", "F64"})


@dataclass(frozen=True)
class Side:
    """One of the two, and the digests of the tensors that were read."""

    checkpoint: Checkpoint
    digests: dict[str, Digest] = field(default_factory=dict)

    def raw(self, name: str, room: Tensor | None = None) -> Tensor:
        """Return a tensor's bytes, in new memory or in ``room``."""
        tensor = self.checkpoint.tensors[name]
        raw = torch.empty(tensor.nbytes, dtype=torch.uint8) if room is None else room
        self.checkpoint.read_into(tensor, 0, raw.numpy().data)
        return raw

    def note(self, name: str, raw: Tensor) -> None:
        """Remember the digest of what was read."""
        self.digests[name] = Digest.from_raw("blake3", blake3(raw.numpy().data).digest())

    def noted(self, name: str, room: Tensor) -> Tensor:
        """Return a tensor's bytes in ``room``, and remember their digest."""
        raw = self.raw(name, room)
        self.note(name, raw)
        return raw

    def typed(self, name: str, raw: Tensor) -> Tensor:
        """Return bytes as the tensor that they are."""
        entry = self.checkpoint.tensors[name].entry
        return raw.view(DTYPES[entry.dtype]).reshape(entry.shape)

    def check_finite(self, name: str, tensor: Tensor) -> None:
        """Refuse NaN and infinity.

        Raises:
            NumericalError: naming the tensor, the file and the first index.
        """
        finite = torch.isfinite(tensor)
        if not bool(finite.all()):
            index = torch.nonzero(~finite)[0].tolist()
            raise NumericalError(
                f"tensor {name!r} of {self.checkpoint.path} holds {float(tensor[tuple(index)])} at {index}"
            )

    def digest(self) -> Digest:
        """Return what the checkpoint is known by, reading what was not read yet."""
        for name in self.checkpoint.tensors:
            if name not in self.digests:
                self.note(name, self.raw(name))
        return checkpoint_digest((t.entry, self.digests[name]) for name, t in self.checkpoint.tensors.items())


@dataclass(frozen=True)
class Twins:
    """A base and its fine-tune, open."""

    before: Side
    after: Side
    space: Workspace = field(default_factory=Workspace)

    @property
    def shared(self) -> list[str]:
        """The tensors that both have, in the order of the fine-tune's file."""
        return [name for name in self.after.checkpoint.tensors if name in self.before.checkpoint.tensors]

    @property
    def single(self) -> dict[str, Side]:
        """The tensors that only one has."""
        sides = ((self.before, self.after), (self.after, self.before))
        return {n: one for one, other in sides for n in one.checkpoint.tensors if n not in other.checkpoint.tensors}

    def at(self, name: str) -> tuple[TensorAt, TensorAt]:
        """Where a shared tensor lies in both."""
        return self.before.checkpoint.tensors[name], self.after.checkpoint.tensors[name]

    def are_floats(self, name: str) -> bool:
        """Whether a shared tensor is of types that are computed with."""
        return {tensor.entry.dtype for tensor in self.at(name)} <= FLOATS

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor of the fine-tune."""
        return self.after.checkpoint.tensors[name].entry.shape

    def have_equal_bits(self, name: str) -> bool:
        """Whether a shared tensor is the same bytes of the same type and shape in both."""
        old, new = (tensor.entry for tensor in self.at(name))
        return (old.dtype, old.shape) == (new.dtype, new.shape) and torch.equal(
            self.before.raw(name), self.after.raw(name)
        )

    def read(self, name: str) -> tuple[Tensor, Tensor] | None:
        """Return a shared tensor of both, or None where both are the same bits; the next call overwrites it.

        Raises:
            CompositionError: they differ, and are not of a type that is computed with.
        """
        old, new = self.at(name)
        rooms = [self.space(which, torch.uint8, (at.nbytes,)) for which, at in (("before", old), ("after", new))]
        with ThreadPoolExecutor(2) as pool:
            first, second = pool.map(Side.noted, (self.before, self.after), (name, name), rooms)
        if old.entry.dtype == new.entry.dtype and torch.equal(first, second):
            return None
        if not self.are_floats(name):
            raise CompositionError(
                f"tensor {name!r} differs, and is {old.entry.dtype} in {self.before.checkpoint.path} and "
                f"{new.entry.dtype} in {self.after.checkpoint.path}: integers and quantised numbers have no "
                "difference to extract; take the weights from before they were quantised, or drop the tensor"
            )
        return self.before.typed(name, first), self.after.typed(name, second)

    def saved(self, name: str) -> Tensor:
        """Return a tensor of the fine-tune, to be kept whole.

        Raises:
            CompositionError: of a type that no adapter can hold.
            NumericalError: NaN or infinity.
        """
        entry = self.after.checkpoint.tensors[name].entry
        if entry.dtype not in DTYPES:
            raise CompositionError(f"tensor {name!r} is {entry.dtype}, which no adapter can hold; drop it")
        found = self.after.typed(name, self.after.raw(name))
        self.after.check_finite(name, found)
        return found


@contextmanager
def open_twins(base: AnyPath, finetuned: AnyPath) -> Iterator[Twins]:
    """Open two checkpoints; at the end, refuse if a file has changed meanwhile.

    Raises:
        NotFoundError, FormatError: as ``open_checkpoint``.
        ConflictError: a file changed.
    """
    with open_checkpoint(base) as before, open_checkpoint(finetuned) as after:
        yield Twins(Side(before), Side(after))
        before.check_unchanged()
        after.check_unchanged()


def difference(before: Tensor, after: Tensor, space: Workspace) -> Tensor:
    """Return ``after - before`` as a matrix of its first dimension by the rest, in a buffer of ``space``.

    Numerics: float64 where one of them is, else float32, in which a difference of 16-bit numbers is exact unless one
    is more than 2^13 times the other.
    """
    wide = torch.float64 if torch.float64 in (before.dtype, after.dtype) else torch.float32
    old, new = (tensor.reshape(tensor.shape[0] if tensor.dim() else 1, -1) for tensor in (before, after))
    found = space("difference", wide, (new.shape[0], new.shape[1]))
    for rows in pieces(found):  # the whole of both in a wider type would be the peak of the memory
        torch.sub(new[rows].to(wide), old[rows].to(wide), out=found[rows])
    return found
