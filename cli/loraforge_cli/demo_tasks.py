"""Tasks that a small model really learns: numbers spelt in French, and as the Roman numerals that laws count in.

And each of the two in the other case, which is little to learn for who knows the first.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from loraforge.training.batches import count_labels
from loraforge.training.data.formats import read_samples
from loraforge.training.data.loader import make_loader
from loraforge.training.data.tokens import Bytes, tokenize
from loraforge.training.step import evaluate

LENGTH = 32
NUMBERS = range(1, 70)
UNSEEN = (22, 25, 28, 33, 36, 39, 44, 47, 52, 58, 63, 66)
"""Numbers that no adapter is trained on: their tens and their units it has met, never together."""
EXAMPLES = UNSEEN[::5]

_SMALL = tuple(
    "zéro un deux trois quatre cinq six sept huit neuf dix onze douze treize quatorze quinze seize dix-sept "  # noqa: SIM905 - a list is longer
    "dix-huit dix-neuf".split()
)
_TENS = {2: "vingt", 3: "trente", 4: "quarante", 5: "cinquante", 6: "soixante"}
_ROMAN = {50: "L", 40: "XL", 10: "X", 9: "IX", 5: "V", 4: "IV", 1: "I"}
_TOKENS = Bytes()


def french(number: int) -> str:
    """Spell a number below 70."""
    if number < len(_SMALL):
        return _SMALL[number]
    tens, units = divmod(number, 10)
    return _TENS[tens] + ("" if units == 0 else " et un" if units == 1 else f"-{_SMALL[units]}")


def roman(number: int) -> str:
    """Write a number below 90 in Roman numerals."""
    found = ""
    for value, letters in _ROMAN.items():
        count, number = divmod(number, value)
        found += count * letters
    return found


TASKS: Mapping[str, Callable[[int], str]] = {
    "french": french,
    "law": roman,
    "french/loud": lambda number: french(number).upper(),
    "law/quiet": lambda number: roman(number).lower(),
}
"""What each node of the demo's tree learns, by its path."""
ROOTS = tuple(path for path in TASKS if "/" not in path)
CHILDREN = tuple(path for path in TASKS if "/" in path)


def write_data(folder: Path) -> None:
    """Write ``<task>.jsonl`` to train on, and ``<task>-unseen.jsonl`` to judge by."""
    for path, answer in TASKS.items():
        task = file_of(path)
        for name, numbers in ((task, [n for n in NUMBERS if n not in UNSEEN]), (f"{task}-unseen", UNSEEN)):
            lines = [json.dumps({"prompt": prompt(n), "completion": answer(n)}) + "\n" for n in numbers]
            (folder / f"{name}.jsonl").write_text("".join(lines))


def file_of(path: str) -> str:
    """What the files of a task are called: the last of its path."""
    return path.rpartition("/")[2]


def prompt(number: int) -> str:
    """Return the question, the same one for both tasks."""
    return f"{number:02} = "


def judge(model: Any, folder: Path) -> tuple[dict[str, float], list[str]]:  # noqa: ANN401 - transformers' models have no types here
    """Return a model's mean loss on the unseen numbers of each task, and how it writes the ``EXAMPLES``."""
    losses = {}
    for task in TASKS:
        rows = tokenize(read_samples(folder / f"{file_of(task)}-unseen.jsonl"), _TOKENS, LENGTH, "prompt").rows
        batches = make_loader(rows, len(rows), seed=0, pad=_TOKENS.pad, max_length=LENGTH)
        losses[task] = evaluate(model, batches, count_labels, None)
    return losses, [_write(model, number) for number in EXAMPLES]


@torch.no_grad()
def _write(model: Any, number: int) -> str:  # noqa: ANN401 - as above
    """Let the model go on after the question, the likeliest byte each time; what is no text becomes a dash."""
    start = ids = _TOKENS.encode(prompt(number))
    while len(ids) < LENGTH and ids[-1] != _TOKENS.eos:
        ids = [*ids, int(model.eval()(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
    text = _TOKENS.decode(ids[len(start) :])
    return text if text.isprintable() and "\N{REPLACEMENT CHARACTER}" not in text else "-"
