"""The loss of a batch: the model's own, without the head's rows for tokens that nobody learns.

A causal model of transformers computes logits for every token, though most may be masked. Where its loss is the plain
one, logits are asked for only at positions with a label in some row (``logits_to_keep``), and the loss is the same mean

    -1/n sum_i log softmax(logits_i)[label_i]

over the n labels. Vocabulary times masked tokens, four bytes each and once more for the gradient, are never held.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor, nn

from loraforge.errors import TrainingError
from loraforge.training.batches import IGNORED, Batch


def loss_of(model: nn.Module, batch: Batch, autocast: torch.dtype | None, places: Tensor | None = None) -> Tensor:
    """Run a model on a batch and return its loss; ``places`` are those of ``learned_places``, if known already.

    Raises:
        TrainingError: it returns none.
    """
    device = next(model.parameters()).device.type
    with torch.autocast(device, dtype=autocast, enabled=autocast is not None):
        if isinstance(batch, Mapping):
            if isinstance(batch.get("labels"), Tensor) and keeps_logits(model):
                return _loss_at_labels(model, batch, places)
            out = model(**batch)
        else:
            out = model(*batch) if isinstance(batch, (tuple, list)) else model(batch)
    return _found_in(out)


def losses_of(model: nn.Module, batch: Mapping[str, Any], sizes: list[int], autocast: torch.dtype | None) -> Tensor:
    """Run a model for which ``keeps_logits`` holds on rows of several owners; return the loss of each owner's rows.

    Shapes: ``sizes`` says how many rows each has, in their order -> (owners,).
    Numerics: as ``loss_of`` on the rows of one; a loss that is NaN leaves the gradients of the others what they are.
    """
    device = next(model.parameters()).device.type
    with torch.autocast(device, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        labels, places = _following(batch["labels"]), learned_places(batch["labels"])
        rest = {key: value for key, value in batch.items() if key != "labels"}
        logits = model(**rest, logits_to_keep=places).logits  # (rows, places, vocabulary)
        pairs = zip(torch.split(logits, sizes), torch.split(labels[:, places], sizes), strict=True)
        return torch.stack([_mean_loss(*pair) for pair in pairs])


def keeps_logits(model: nn.Module) -> bool:
    """Whether a model is a causal one with the plain loss that can be asked for some logits only."""
    loss: Any = getattr(model, "loss_function", None)
    router = getattr(getattr(model, "config", None), "output_router_logits", False)  # adds a loss of its own
    return (
        getattr(loss, "__name__", "") == "ForCausalLMLoss" and not router and _takes_logits_to_keep(type(model).forward)
    )


@functools.cache
def _takes_logits_to_keep(forward: Callable[..., Any]) -> bool:
    return "logits_to_keep" in inspect.signature(forward).parameters


def learned_places(labels: Tensor) -> Tensor:
    """Return the positions with a label to predict in some row: labels (rows, T) -> (places,)."""
    return (_following(labels) != IGNORED).any(0).nonzero().flatten()


def _following(labels: Tensor) -> Tensor:
    return F.pad(labels, (0, 1), value=IGNORED)[..., 1:]  # (rows, T): what follows each token


def _loss_at_labels(model: nn.Module, batch: Mapping[str, Any], places: Tensor | None) -> Tensor:
    labels = _following(batch["labels"])
    places = learned_places(batch["labels"]) if places is None else places
    rest = {key: value for key, value in batch.items() if key != "labels"}
    logits = model(**rest, logits_to_keep=places).logits  # (rows, places, vocabulary)
    return _mean_loss(logits, labels[:, places])


def _mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


def _found_in(out: Any) -> Tensor:  # noqa: ANN401 - whatever a model returns
    loss = out.get("loss") if isinstance(out, Mapping) else getattr(out, "loss", None)
    if loss is None:
        loss = out[0] if isinstance(out, (tuple, list)) and out else out
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise TrainingError(
            f"the model returned {type(out).__name__} without a loss: its forward must give a scalar, an object or "
            "dict with 'loss', or a tuple that begins with it (transformers' models need 'labels' in the batch)"
        )
    return loss.reshape(()).float() if loss.dtype.itemsize < 4 else loss.reshape(())
