"""The gradients of several adapters from one forward and one backward pass, or from as many as there are adapters.

Micro-batches of several owners are put together row by row. Rows do not mix, the base is frozen, and each owner's loss
is the mean over its own labels, so that

    d/dtheta_k sum_j n_j/N_j loss_j = n_k/N_k d loss_k/dtheta_k

with n_k labels in this micro-batch and N_k in the window: what k's run alone has, to the rounding of wider products.

Whether rows mix is the model's affair (batch norm, experts with a capacity, sequence-first layouts, a base with dropout
of its own). It is not assumed but tried: ``agree`` compares both ways before the first of them counts.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor, nn

from loraforge.layers.shared import ApartError, Rows, Shared
from loraforge.training.batches import IGNORED, Batch, Count, to_device
from loraforge.training.losses import keeps_logits, losses_of
from loraforge.training.step import window_gradient
from loraforge.training.streams import number_of, seed_all

RowLosses = Callable[[nn.Module, Batch], Tensor]
"""The model's loss of each row, summed over its labels: (rows,)."""
_FILLERS: Mapping[str, int] = {
    "input_ids": 0,
    "labels": IGNORED,
    "attention_mask": 0,
    "position_ids": 0,
    "token_type_ids": 0,
}
"""What fills up the rows of a shorter batch."""


@dataclass(frozen=True)
class Turn:
    """What one adapter brings to a step: its window, and the seed and number that its random values are made of."""

    name: str
    batches: Sequence[Batch]
    seed: int
    step: int


@dataclass(frozen=True)
class Way:
    """How losses come about: the model, the adapters in it, how labels are counted.

    ``narrow`` is the type that frozen weights are cast to once, if any.
    """

    model: nn.Module
    shared: Shared
    count: Count
    autocast: torch.dtype | None
    row_losses: RowLosses | None = None
    narrow: torch.dtype | None = None


Found = dict[str, tuple[float, int]]
"""The loss of each adapter's window, and the number of its labels."""


def in_turns(way: Way, turns: Sequence[Turn]) -> Found:
    """Add each adapter's gradient, one after another: to the bit those of runs alone."""
    found = {}
    for turn in turns:
        with way.shared.alone(turn.name):
            seed_all(turn.seed, "step", turn.step)
            found[turn.name] = window_gradient(way.model, turn.batches, way.count, way.autocast)
    return found


def together(way: Way, turns: Sequence[Turn]) -> Found:
    """Add all adapters' gradients, those of their first micro-batches from one pass, and so on.

    Every window has a label.

    Raises:
        ApartError: the batches cannot be put together, or the model does not keep rows apart.
    """
    counts = {turn.name: [way.count(way.model, batch) for batch in turn.batches] for turn in turns}
    totals = {name: sum(numbers) for name, numbers in counts.items()}
    losses = dict.fromkeys(totals, 0.0)
    seed_all(turns[0].seed, "together", turns[0].step)  # for the base's own: ``agree`` finds where it has such
    for turn in turns:
        way.shared.generators[turn.name].manual_seed(number_of(turn.seed, "step", turn.step))
    for place in range(max(map(len, counts.values()))):
        live = [turn for turn in turns if place < len(turn.batches) and counts[turn.name][place]]
        if live:
            shares = [counts[turn.name][place] / totals[turn.name] for turn in live]
            here = [counts[turn.name][place] for turn in live]
            found = _pass(way, [(turn.name, turn.batches[place]) for turn in live], here, shares)
            for turn, loss in zip(live, found, strict=True):
                losses[turn.name] += loss
    return {name: (loss, totals[name]) for name, loss in losses.items()}


def agree(
    first: Mapping[str, Sequence[Tensor]], second: Mapping[str, Sequence[Tensor]], tolerance: float
) -> str | None:
    """Say which adapter's gradients differ between two ways to compute them by more than rounding, if one's do.

    What is not finite both ways is the adapter's own misfortune.
    """
    for name, gradients in second.items():
        size = torch.nn.utils.get_total_norm(gradients)
        apart = [one - two for one, two in zip(first[name], gradients, strict=True)]
        if bool(torch.isfinite(size)) and not bool(torch.nn.utils.get_total_norm(apart) <= tolerance * size):
            return name
    return None


def _pass(way: Way, owned: Sequence[tuple[str, Batch]], counts: Sequence[int], shares: Sequence[float]) -> list[float]:
    """Run forward and backward on one micro-batch of each owner; return each one's share of its window's loss."""
    device = next(way.model.parameters()).device
    batch, rows = put_together(way.model, owned)
    batch, sizes = to_device(batch, device), [one.count for one in rows]
    with way.shared.rows(rows):
        losses = _losses(way, batch, sizes, torch.tensor(counts, device=device))
        parts = losses * torch.tensor(shares, device=device, dtype=losses.dtype)
        parts.sum().backward()  # type: ignore[no-untyped-call]
    found: list[float] = parts.detach().tolist()
    return found


def _losses(way: Way, batch: Batch, sizes: list[int], counts: Tensor) -> Tensor:
    """Run the model, and return the mean loss of each owner's rows."""
    if way.row_losses is not None:
        with torch.autocast(counts.device.type, dtype=way.autocast or torch.bfloat16, enabled=way.autocast is not None):
            each = way.row_losses(way.model, batch)
        if each.shape != (sum(sizes),):
            raise ApartError(f"row_losses gave {list(each.shape)}, expected one number for each of {sum(sizes)} rows")
        return torch.stack([part.sum() for part in torch.split(each, sizes)]) / counts
    if isinstance(batch, Mapping) and "labels" in batch and keeps_logits(way.model):
        return losses_of(way.model, batch, sizes, way.autocast)
    raise ApartError(f"{type(way.model).__name__} gives one loss for all rows (give row_losses)")


def put_together(model: nn.Module, owned: Sequence[tuple[str, Batch]]) -> tuple[Batch, list[Rows]]:
    """Return one batch of the rows of all, and whose they are; shorter rows are filled up at their ends.

    Raises:
        ApartError: the batches are not alike, or hold what it is not known how to fill up.
    """
    names, batches = zip(*owned, strict=True)
    parts = [_parts(batch) for batch in batches]
    if any(part.keys() != parts[0].keys() for part in parts):
        raise ApartError("the batches do not all have the same keys")
    counts = [_row_count(part) for part in parts]
    lengths = [part["input_ids"].shape[1] if "input_ids" in part else 0 for part in parts]
    width = max(lengths)
    if min(lengths) < width:
        parts = [_with_mask(model, part) for part in parts]
    joined = {key: _joined(key, [_filled(key, part[key], width) for part in parts]) for key in parts[0]}
    rows = [Rows(*one, width) for one in zip(names, counts, lengths, strict=True)]
    return _like(batches[0], joined), rows


def _joined(key: object, tensors: Sequence[Tensor]) -> Tensor:
    shapes = {tuple(tensor.shape[1:]) for tensor in tensors}
    if len(shapes) > 1:
        raise ApartError(f"{key!r} has rows of {sorted(shapes)}, and it is not known how to fill up the smaller ones")
    return torch.cat(list(tensors))


def _parts(batch: Batch) -> dict[Any, Tensor]:
    """The tensors of a batch by key or place."""
    found = (
        batch if isinstance(batch, Mapping) else dict(enumerate(batch if isinstance(batch, (tuple, list)) else [batch]))
    )
    if not all(isinstance(value, Tensor) and value.ndim for value in found.values()):
        raise ApartError("a batch holds what is no tensor of rows")
    return dict(found)


def _like(batch: Batch, joined: dict[Any, Tensor]) -> Batch:
    if isinstance(batch, Mapping):
        return joined
    return tuple(joined.values()) if isinstance(batch, (tuple, list)) else joined[0]


def _row_count(part: Mapping[Any, Tensor]) -> int:
    counts = {len(value) for value in part.values()}
    if len(counts) != 1:
        raise ApartError(f"the tensors of a batch have different numbers of rows: {sorted(counts)}")
    return counts.pop()


def _with_mask(model: nn.Module, part: Mapping[Any, Tensor]) -> dict[Any, Tensor]:
    """Add the mask that a batch without one means, so that nobody looks at what is filled up."""
    if "attention_mask" in part:
        return dict(part)
    if "attention_mask" not in inspect.signature(type(model).forward).parameters:
        raise ApartError("rows differ in length, and the model takes no attention_mask")
    return {**part, "attention_mask": torch.ones_like(part["input_ids"])}


def _filled(key: object, tensor: Tensor, width: int) -> Tensor:
    if tensor.ndim == 4 and key == "attention_mask":  # (rows, 1, T, T), added to the scores
        return _filled_square(tensor, width - tensor.shape[-1])
    if tensor.ndim == 2 and key in _FILLERS and tensor.shape[1] < width:
        return F.pad(tensor, (0, width - tensor.shape[1]), value=_FILLERS[str(key)])
    return tensor


def _filled_square(mask: Tensor, more: int) -> Tensor:
    """Fill up a mask of scores: what is added sees all alike and is seen by nobody, and no softmax is over nothing."""
    if more == 0:
        return mask
    if mask.dtype == torch.bool or mask.shape[-1] != mask.shape[-2]:
        raise ApartError("an attention mask is not one that is added to the scores")
    return F.pad(mask, (0, more, 0, more), value=torch.finfo(mask.dtype).min)
