"""What a run will hold at its peak, found by running one step on tensors that have shapes and no values.

Nothing is guessed about a model: torch's own ``FakeTensorMode`` goes through the real forward and backward of the
heaviest batch, and every storage that an operation makes is counted from its birth to its end. It takes no memory and
little time, whatever the size of the model. To that are added what lies there all the time (base, adapter, copies of
it, moments, batches that wait), and the moments where that is the larger sum (the optimizer, a checkpoint).

Not seen: what a kernel holds for itself, what the allocator does not give back, and Python.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

from loraforge.errors import TrainingError
from loraforge.layers import Injected, inject, narrow, widen
from loraforge.training import ranks
from loraforge.training.batches import Batch
from loraforge.training.config import TrainConfig
from loraforge.training.loop import autocast_of, checkpointing, choose_device, narrow_type
from loraforge.training.losses import learned_places, loss_of
from loraforge.training.streams import apart

_NEEDS_VALUES = (
    fake_tensor.DataDependentOutputException,
    fake_tensor.DynamicOutputShapeException,
    fake_tensor.UnsupportedFakeTensorException,
    fake_tensor.UnsupportedOperatorException,
)


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a run. ``step`` is what a step makes: activations, logits, gradients, temporary results.

    ``kept`` of it are there between forward and backward. ``adapter`` counts every copy of it, ``batches`` those that
    wait on the device, ``copy`` the frozen weights in the type that is computed in.
    """

    base: int
    copy: int
    adapter: int
    moments: int
    batches: int
    step: int
    kept: int

    @property
    def total(self) -> int:
        """The peak."""
        return self.base + self.copy + self.adapter + self.moments + self.batches + self.step


def estimate(model: nn.Module, heavy: Iterable[Batch], config: TrainConfig, *, valid: Iterable[Batch] = ()) -> Memory:
    """Return what training ``model`` will hold, if no batch is heavier than those in ``heavy`` and ``valid``.

    Cost: the Python side of a step for each batch, and the adapter's own start (an SVD of each target with PiSSA).

    Raises:
        TargetError: the modules cannot be adapted as asked.
        TrainingError: the model's forward depends on the values of its tensors, so that it cannot be followed.
    """
    heavy, valid = list(heavy), list(valid)
    device = choose_device(config.device)
    training = {name: module.training for name, module in model.named_modules()}
    with apart():
        injected = inject(model, config)
    undo: Callable[[], object] = bool
    try:
        if config.grad_checkpoint:
            undo = checkpointing(model)
        types = autocast_of(config, device), narrow_type(config, device)
        model.train()
        steps = [_follow(model, batch, types, min(config.grad_accum, 2)) for batch in heavy]
        model.eval()
        judged = [_follow(model, batch, types, 0) for batch in valid]
        fixed = _fixed(model, injected, config, heavy, device)
        copies = _bytes(injected.parameters().values()) if valid else 0  # of the best
        peak, kept, narrowed = max(steps + judged)
        return replace(fixed, copy=narrowed, adapter=fixed.adapter + copies, step=max(peak, fixed.step), kept=kept)
    finally:
        undo()
        widen(model)
        injected.remove()
        for name, module in model.named_modules():
            module.training = training.get(name, module.training)


def _fixed(
    model: nn.Module, injected: Injected, config: TrainConfig, heavy: Iterable[Batch], device: torch.device
) -> Memory:
    """What is there whatever a step does; as for the step, a checkpoint copies the adapter beside its gradients."""
    trained = injected.parameters().values()
    gradients, buffers = _bytes(trained), injected.buffers().values()
    own = {id(tensor) for tensor in (*trained, *buffers)}
    base = _bytes(t for t in (*model.parameters(), *model.buffers()) if id(t) not in own)
    whole = _bytes(injected.whole.values())  # trained as they are: the base's own, but for what they were before
    adapter = gradients - whole + _bytes(buffers) + _bytes(injected.before.values())
    # one micro-batch is read ahead of the window; on another device a batch is only there while it is used
    waiting = config.grad_accum * ranks.size() + 1 if device.type == "cpu" else 1
    batches = waiting * max(map(_bytes_of_batch, heavy), default=0)
    return Memory(base + whole, 0, adapter, 2 * gradients, batches, 2 * gradients + _bytes(buffers), 0)


def _follow(
    model: nn.Module, batch: Batch, types: tuple[torch.dtype | None, torch.dtype | None], micro_batches: int
) -> tuple[int, int, int]:
    """Return the peak of forward and backward, what is live between them, and the bytes of narrow weights.

    With 0 micro-batches it is the forward's alone, without gradients. ``types`` are those of autocast and of the narrow
    weights. The second micro-batch meets the gradients of the first.
    """
    places = learned_places(batch["labels"]) if isinstance(batch, Mapping) and "labels" in batch else None
    kept = 0
    with _unseen() as fake:
        inputs = tree_map_only(Tensor, fake.from_tensor, (batch, places))
        narrowed = narrow(model, types[1])
        live = _Live([*map(fake.from_tensor, (*model.parameters(), *model.buffers())), *narrowed])
        with live, torch.set_grad_enabled(micro_batches > 0):
            for _ in range(max(1, micro_batches)):
                loss = loss_of(model, inputs[0], types[0], inputs[1])
                kept = live.now
                if micro_batches:
                    loss.backward()  # type: ignore[no-untyped-call]
        for parameter in model.parameters():
            parameter.grad = None
        widen(model)
    return live.peak, kept, sum(copy.nbytes for copy in narrowed)


@contextmanager
def _unseen() -> Iterator[FakeTensorMode]:
    """Tensors without values; what needs them is named."""
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            yield fake
    except _NEEDS_VALUES as error:
        raise TrainingError(
            f"the model's forward depends on the values of its tensors ({type(error).__name__}), so that what it will "
            "hold cannot be known before it runs"
        ) from error


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of storages that live, ``now`` and at their ``peak``, but for those of ``known`` tensors."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known = list(known)  # kept, or the next operation that reads one would make another storage for it
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet(tensor.untyped_storage() for tensor in self._known)

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Any = None,  # noqa: ANN401 - what torch hands on
    ) -> Any:  # noqa: ANN401 - whatever the operation gives
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: Any) -> None:  # noqa: ANN401 - a storage without a type of its own
        if storage in self._seen:
            return
        self._seen.add(storage)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, size)

    def _drop(self, size: int) -> None:
        self.now -= size


def _bytes(tensors: Iterable[Tensor]) -> int:
    """The bytes of distinct storages."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _bytes_of_batch(batch: Batch) -> int:
    return _bytes(leaf for leaf in tree_iter(batch) if isinstance(leaf, Tensor))
