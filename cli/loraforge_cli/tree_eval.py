"""The loss of every node of a tree on some data, each reached from its neighbour in one live model."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from loraforge.training.batches import count_labels
from loraforge.training.data.formats import read_samples
from loraforge.training.data.loader import make_loader
from loraforge.training.data.tokens import Mask, tokenize
from loraforge.training.loop import choose_device
from loraforge.training.step import evaluate
from loraforge.tree import Tree
from loraforge_cli.train_base import check_fits, load_model, load_tokenizer


@dataclass(frozen=True)
class Judged:
    """A node and its loss; the base is ``""``. ``written`` are the bytes that were changed to come here."""

    path: str
    loss: float
    written: int


def losses(
    tree: Tree, data: Path, *, base: Path, batch_size: int, max_length: int, mask: Mask, device: str
) -> Iterator[Judged]:
    """Yield the loss of the base and of every node, parents before children."""
    tokenizer = load_tokenizer(str(base))
    rows = tokenize(read_samples(data), tokenizer, max_length, mask).rows
    model = load_model(str(base), "fp32").to(choose_device(device))
    check_fits(model, max(len(row.ids) for row in rows), max(max(row.ids) for row in rows), tokenizer)
    loader = make_loader(rows, batch_size, seed=0, pad=tokenizer.pad, max_length=max_length)
    with tree.live(model, base=base) as live:
        for path in ("", *sorted(tree.record.nodes)):
            live.checkout(path)
            yield Judged(path, evaluate(model, loader, count_labels, None), live.written)
