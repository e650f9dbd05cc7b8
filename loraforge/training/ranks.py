"""Several processes, one run: each takes its share of a window, and the sums are those of one process.

Every process reads the same windows and counts all labels, so a micro-batch's share of the loss is known before any
message; then gradients, small as an adapter's are, are added up in one message for each element type. The base is on
every device. Without ``torch.distributed`` this is a world of one, in which nothing is sent.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


def size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process."""
    return dist.get_rank() if size() > 1 else 0


def share(items: Sequence[T]) -> Sequence[T]:
    """Return what of a sequence is this process's."""
    return items[rank() :: size()]


def add_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its sum over all processes; one that no process has stays None."""
    if size() == 1:
        return
    found = [parameter for parameter in parameters if parameter.requires_grad]
    reached = torch.tensor([float(parameter.grad is not None) for parameter in found], device=found[0].device)
    dist.all_reduce(reached)
    kept = [parameter for parameter, number in zip(found, reached.tolist(), strict=True) if number]
    for dtype in sorted({parameter.dtype for parameter in kept}, key=str):
        group = [parameter for parameter in kept if parameter.dtype == dtype]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in group]
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat)
        for parameter, total in zip(group, torch.split(flat, [p.numel() for p in group]), strict=True):
            parameter.grad = total.view_as(parameter).clone()


def total(*numbers: float, device: torch.device) -> list[float]:
    """Return the sums of numbers over all processes."""
    if size() == 1:
        return list(numbers)
    sums = torch.tensor(numbers, dtype=torch.float64 if device.type != "mps" else torch.float32, device=device)
    dist.all_reduce(sums)
    return [float(number) for number in sums.tolist()]


def align(tensors: Mapping[str, Tensor]) -> None:
    """Give every process the tensors of the first: factors that an SVD made may differ in their last bits."""
    if size() > 1:
        for _, tensor in sorted(tensors.items()):
            dist.broadcast(tensor.detach(), 0)


def wait() -> None:
    """Go on when every process is here."""
    if size() > 1:
        dist.barrier()
