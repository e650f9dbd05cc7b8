"""One step: the gradient of a window of micro-batches, clipped, into AdamW."""

from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import nn

from loraforge.errors import TrainingError
from loraforge.training import ranks
from loraforge.training.batches import Batch, Count, to_device
from loraforge.training.config import TrainConfig
from loraforge.training.losses import loss_of
from loraforge.training.shard import is_sharded


def window_gradient(
    model: nn.Module, batches: Sequence[Batch], count: Count, autocast: torch.dtype | None
) -> tuple[float, int]:
    """Add the gradient of the mean loss over all labels of a window; return that loss and the number of labels.

    A micro-batch's loss is the mean over its own n_i labels; the window's is ``sum_i n_i loss_i / sum_i n_i``, whatever
    way the labels fall into micro-batches, and these onto processes. One without labels is left out.

    Raises:
        TrainingError: no label in the whole window.
    """
    device = next(model.parameters()).device
    counts = [count(model, batch) for batch in batches]
    total = sum(counts)
    if total == 0:
        raise TrainingError(f"none of the {len(batches)} micro-batches of a step has a label to learn: all are masked")
    mean = torch.zeros((), dtype=torch.float64 if device.type != "mps" else torch.float32, device=device)
    for batch, number in ranks.share(list(zip(batches, counts, strict=True))):
        if number:
            loss = loss_of(model, to_device(batch, device), autocast)
            (loss * (number / total)).backward()  # type: ignore[no-untyped-call]
            mean += loss.detach() * (number / total)
    if is_sharded(model):
        some = next(batch for batch, number in zip(batches, counts, strict=True) if number)
        for _ in range(_idle(counts)):  # the others need this one's part of the base
            (loss_of(model, to_device(some, device), autocast) * 0).backward()  # type: ignore[no-untyped-call]
    ranks.add_gradients(model.parameters())
    return ranks.total(float(mean), device=device)[0], total


def _idle(counts: Sequence[int]) -> int:
    """How much less often than the busiest process this one runs the model in a window."""
    each = [sum(map(bool, counts[place :: ranks.size()])) for place in range(ranks.size())]
    return max(each) - each[ranks.rank()]


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Batch], count: Count, autocast: torch.dtype | None) -> float:
    """Return the mean loss over all labels of ``batches``, in evaluation mode.

    Raises:
        TrainingError: no label in all of them.
    """
    device, training = next(model.parameters()).device, model.training
    together = is_sharded(model)
    model.eval()
    try:
        labels, weighted = 0, 0.0
        for place, batch in enumerate(batches):
            mine = place % ranks.size() == ranks.rank()
            number = count(model, batch) if mine or together else 0
            if number:
                loss = float(loss_of(model, to_device(batch, device), autocast))
                weighted, labels = (weighted + number * loss, labels + number) if mine else (weighted, labels)
    finally:
        model.train(training)
    weighted, total = ranks.total(weighted, labels, device=device)
    if total == 0:
        raise TrainingError("the validation data has no label at all")
    return weighted / total


def make_optimizer(
    parameters: Mapping[str, nn.Parameter], b_factors: Collection[str], config: TrainConfig
) -> torch.optim.AdamW:
    """Return AdamW over the trained parameters, in groups by LoRA+'s rate and by weight decay.

    The parameters in ``b_factors`` have ``loraplus_ratio`` times the rate. Biases and magnitudes do not decay.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        decay = 0.0 if parameter.ndim < 2 else config.weight_decay
        groups.setdefault((config.loraplus_ratio if name in b_factors else 1.0, decay), []).append(parameter)
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters.values())
    return torch.optim.AdamW(
        [{"params": ps, "ratio": ratio, "weight_decay": decay} for (ratio, decay), ps in groups.items()],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=fused,
    )


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["ratio"]


def clip(parameters: Mapping[str, nn.Parameter], limit: float) -> float:
    """Scale all gradients so that their common norm is at most ``limit`` (0: leave them); return the norm before."""
    found = [parameter for parameter in parameters.values() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in found if p.grad is not None])
    if limit:
        torch.nn.utils.clip_grads_with_norm_(found, limit, norm)
    return float(norm)


def check_reached(parameters: Mapping[str, nn.Parameter]) -> None:
    """Refuse to go on when a trained tensor got no gradient.

    Raises:
        TrainingError: naming it.
    """
    dead = [name for name, parameter in parameters.items() if parameter.grad is None]
    if dead:
        raise TrainingError(
            f"{len(dead)} of {len(parameters)} trained tensors got no gradient in the first step, the first is "
            f"{dead[0]!r}: the forward pass does not reach them; exclude those modules"
        )
