"""The learning rate as a pure function of the step: nothing to save, nothing to step twice."""

import math

from loraforge.training.config import Schedule


def rate(schedule: Schedule, step: int, total: int | None, warmup: float) -> float:
    """Return the factor of the learning rate in step ``step``, counted from 0, of ``total``.

    With w warm-up steps and p = (step - w) / (total - w):

        step < w   step / w
        constant   1
        linear     1 - p
        cosine     (1 + cos(pi p)) / 2

    These are transformers' ``get_*_schedule_with_warmup``. ``total`` may be None for a constant rate.
    """
    first = warmup_steps(warmup, total)
    if step < first:
        return step / first
    if schedule == "constant" or total is None:
        return 1.0
    left = (total - step) / max(1, total - first)
    return max(0.0, left) if schedule == "linear" else (1 + math.cos(math.pi * min(1.0, 1 - left))) / 2


def warmup_steps(warmup: float, total: int | None) -> int:
    """Return a warm-up in steps, from steps or from a share of all of them."""
    return math.ceil(warmup * (total or 0)) if warmup < 1 else int(warmup)
