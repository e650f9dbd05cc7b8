"""What a run looked like: a picture of it, and TensorBoard's files while it goes on."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import click

from loraforge.training import Metrics

_SMOOTH_FROM = 50
"""Steps from which a line of means helps the eye."""


def check_plot(path: Path) -> None:
    """Find out before hours of training that a picture cannot be drawn.

    Raises:
        UsageError: matplotlib is missing, or cannot write such a file.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ModuleNotFoundError as error:
        raise click.UsageError("--plot needs matplotlib: pip install 'loraforge[plot]'") from error
    known = sorted(FigureCanvasBase.filetypes)
    if path.suffix.removeprefix(".") not in known:
        raise click.UsageError(f"--plot {path}: no picture has the ending {path.suffix!r}; expected .png or .svg")
    if not path.parent.is_dir():
        raise click.UsageError(f"--plot {path}: there is no directory {path.parent}")


def draw(steps: Sequence[Metrics], path: Path, title: str) -> None:
    """Draw loss, learning rate and gradient norm over the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 7), layout="constrained")
    loss, rate, norm = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1, 1))
    numbers = [metrics.step for metrics in steps]
    losses = [metrics.loss for metrics in steps]
    means = _means(losses)
    loss.plot(numbers, losses, color="C0", alpha=1.0 if means is None else 0.35, linewidth=1, label="training")
    if means is not None:
        loss.plot(numbers, means, color="C0", linewidth=1.8, label="training, mean")
    judged = [(m.step, m.eval_loss) for m in steps if m.eval_loss is not None and math.isfinite(m.eval_loss)]
    if judged:
        loss.plot(*zip(*judged, strict=True), "o-", color="C1", markersize=4, label="evaluation")
    loss.set(ylabel="loss", title=title)
    loss.legend(frameon=False)
    rate.plot(numbers, [metrics.lr for metrics in steps], color="C2", linewidth=1.2)
    rate.set(ylabel="learning rate")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    norm.plot(numbers, [metrics.grad_norm for metrics in steps], color="C3", linewidth=1)
    norm.set(ylabel="gradient norm", xlabel="step")
    for axes in (loss, rate, norm):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    norm.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path, dpi=150)


def _means(losses: Sequence[float]) -> list[float] | None:
    """Exponential means, corrected for their start; None where there are too few to need them."""
    if len(losses) < _SMOOTH_FROM:
        return None
    keep = 1 - 10 / len(losses)
    mean, found = 0.0, []
    for number, loss in enumerate(losses, 1):
        mean = keep * mean + (1 - keep) * loss
        found.append(mean / (1 - keep**number))
    return found


@contextmanager
def board(folder: str | None) -> Iterator[Callable[[Metrics], None]]:
    """Write TensorBoard's files into a directory, or nothing without one.

    Raises:
        UsageError: TensorBoard is missing.
    """
    if folder is None:
        yield lambda _: None
        return
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ModuleNotFoundError as error:
        raise click.UsageError("--tensorboard needs TensorBoard: pip install tensorboard") from error

    with SummaryWriter(folder) as writer:

        def write(metrics: Metrics) -> None:
            for name in ("loss", "lr", "grad_norm", "eval_loss"):
                value = getattr(metrics, name)
                if value is not None:
                    writer.add_scalar(f"train/{name}", value, metrics.step)

        yield write
