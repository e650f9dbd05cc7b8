r"""A node's weights in a live model: only what differs from those that are in it is written, and the base comes back.

Equation: ``W_node = RN(W_base + sum of the deltas on the path)``, done by the same kernels as a merge on disk, block by
block, from the base's files into the model's parameters. The base is never computed back from what is there: it is
read again, so nothing drifts, however many moves there are. A model in another float type than its checkpoint holds
what a loader would make of the merged checkpoint: the rounded value, converted.
"""

import mmap
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Self, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from loraforge.adapter import DTYPES
from loraforge.checkpoint.engine import Job, blocks_of, check_finite, in_threads, matrix_shape
from loraforge.checkpoint.homes import find_homes
from loraforge.checkpoint.reader import Checkpoint, TensorAt, open_checkpoint
from loraforge.checkpoint.workspace import Workspace
from loraforge.errors import CompositionError
from loraforge.tree.cache import Cache
from loraforge.tree.nodes import Key, Plans
from loraforge_registry.digest import Digest
from loraforge_registry.paths import AnyPath

Find: TypeAlias = Callable[[str], Mapping[str, Digest]]
Children: TypeAlias = Callable[[str], Iterable[Digest]]


class Live:
    """A model, the checkpoint that it was loaded from, and what is in each of its tensors now.

    Use ``Tree.live``, or ``Tree.checkout``. Nobody else may write to the parameters
    that nodes change meanwhile.
    """

    def __init__(self, model: nn.Module, base: AnyPath, cache: Cache, find: Find, children: Children) -> None:
        self._model, self._find_path = model, find
        self._cache, self._children = cache, children
        self._files = ExitStack()
        self._checkpoint = self._files.enter_context(open_checkpoint(base))
        self._pages = {
            name: mmap.mmap(shard.fd, 0, access=mmap.ACCESS_COPY) for name, shard in self._checkpoint.shards.items()
        }
        self._spaces: list[Workspace] = []  # one for each thread that was ever busy
        self._plans = Plans(self._checkpoint, cache)
        self._inside: dict[str, Key | None] = {}  # None: half-written, when something went wrong
        self._names: dict[str, str] = {}
        self._homes: Mapping[str, Tensor] = {}
        self.path: dict[str, Digest] = {}
        self.written = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def checkout(self, path: str) -> None:
        """Put the weights of the node at ``path`` into the model (see ``move``); ``""`` is the base.

        What grew on the node is then opened ahead, in a thread, as far as the cache has room.
        """
        self.move(self._find_path(path))
        self._cache.prefetch(self._children(path))

    def move(self, path: Mapping[str, Digest]) -> None:
        """Put a node's weights into the model; an empty path is the base.

        Cost: reads and writes the tensors in which the two paths differ, at about the speed of a merge.

        Raises:
            CompositionError: the path does not fit the base, or the model is not this base.
            ConflictError: the base's files have changed.
            NumericalError: a weight that the element type cannot hold; the model holds the base again.
        """
        plan = self._plans.of(path)
        differing = [
            name
            for name in {**self._inside, **plan.keys}
            if self._inside.get(name, ()) != plan.keys.get(name, ())
        ]  # fmt: skip
        self._checkpoint.check_unchanged()
        self._find(differing)
        try:
            self._write(Job(self._checkpoint.tensors[name], plan.changes.get(name)) for name in differing)
        except BaseException:
            self._restore()
            raise
        self._inside.update({name: plan.keys.get(name, ()) for name in differing})
        self.path = dict(path)
        self.written = sum(self._checkpoint.tensors[name].nbytes for name in differing)

    def close(self) -> None:
        """Put the base back, bit for bit, and let go of its files."""
        with self._files:
            self._cache.stop()
            self.move({})

    def _restore(self) -> None:
        """Put the base back after an error: everything that was written, whole or half."""
        self._write(Job(self._checkpoint.tensors[name]) for name, key in self._inside.items() if key != ())
        self._inside = dict.fromkeys(self._inside, ())
        self.path = {}

    def _write(self, jobs: Iterable[Job]) -> None:
        """Compute new values where they belong, in the model's own memory, from the base's pages."""

        def run(job: Job) -> None:
            torch.set_num_threads(1)
            space = self._spaces.pop() if self._spaces else Workspace()
            self._write_one(job, space)
            self._spaces.append(space)

        found = sorted(jobs, key=lambda job: -job.tensor.nbytes)
        # neither the old nor the new, until all are written
        self._inside.update({job.tensor.entry.name: None for job in found})
        for _ in in_threads(run, found):
            pass

    def _write_one(self, job: Job, space: Workspace) -> None:
        tensor, change = job.tensor, job.change
        home, base = self._homes[tensor.entry.name], self._base_of(tensor)
        if change is None:
            home.copy_(base.view(home.shape))
            return
        blocks = blocks_of(tensor)
        change.prepare(lambda rows: base[rows], blocks, space)
        for rows in blocks:
            place, block = home[rows] if home.dim() else home, base[rows]
            target = place.view(block.shape) if place.is_contiguous() else None
            outcome = change.forward(block, rows, _Into(target, space), back=False)
            check_finite(tensor, block, outcome, rows)
            if outcome.values is not target:
                place.copy_(outcome.values.view(place.shape))
        # what the change computed of its factors stays, for the next time: see ``Cache``

    def _base_of(self, tensor: TensorAt) -> Tensor:
        """Return a tensor of the base as a matrix, in the pages of its file."""
        dtype, pages = DTYPES[tensor.entry.dtype], memoryview(self._pages[tensor.shard])
        raw = pages[tensor.begin : tensor.begin + tensor.nbytes]
        if tensor.begin % tensor.itemsize:
            raw = memoryview(bytearray(raw))  # numbers that do not lie as numbers do
        flat = torch.frombuffer(raw, dtype=dtype) if tensor.nbytes else torch.empty(0, dtype=dtype)
        return flat.view(matrix_shape(tensor))

    def _find(self, names: Sequence[str]) -> None:
        """Find the parameters as they are now: a move to another device may have replaced them since.

        Those that are written for the first time must hold the base.
        """
        state = self._model.state_dict(keep_vars=True)
        new = [name for name in names if name not in self._names]
        found = find_homes(new, state, "the checkpoint") if new else {}
        for name in new:
            tensor, home = self._checkpoint.tensors[name], state[found[name]].detach()
            _check_holds(self._checkpoint, tensor, home, found[name], self._base_of(tensor))
        self._names |= found
        self._homes = {name: state[called].detach() for name, called in self._names.items()}


class _Into:
    """A workspace that gives a place in the model where new values are wanted, if that has their type."""

    def __init__(self, target: Tensor | None, space: Workspace) -> None:
        self._target, self._space = target, space

    def __call__(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """Return a buffer."""
        target = self._target
        if target is None or name != "values" or dtype != target.dtype or target.device.type != "cpu":
            return self._space(name, dtype, shape)
        return target


def _check_holds(checkpoint: Checkpoint, tensor: TensorAt, home: Tensor, called: str, base: Tensor) -> None:
    """Refuse a model that is not the base: a node atop anything else means nothing.

    Raises:
        CompositionError: the shape, the type or a value is another.
    """
    shape = tensor.entry.shape
    if tuple(home.shape) != shape or not home.is_floating_point() or home.is_meta:
        raise CompositionError(
            f"the model's {called!r} is {home.dtype} {list(home.shape)}{' on meta' if home.is_meta else ''}, the "
            f"base's is {tensor.entry.dtype} {list(shape)}: load the model from the tree's base, unquantised"
        )
    for rows in blocks_of(tensor):
        here = home[rows] if home.dim() else home
        if not _same_bits(base[rows].to(here.dtype).view(here.shape), here.cpu()):
            raise CompositionError(
                f"the model's {called!r} does not hold the base's values ({checkpoint.path}): load the model from the "
                "tree's base, and take out what is merged into it"
            )


def _same_bits(first: Tensor, second: Tensor) -> bool:
    one, other = (np.ascontiguousarray(t.contiguous().view(torch.uint8).numpy()) for t in (first, second))
    return bool(np.array_equal(one, other))
