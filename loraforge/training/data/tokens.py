"""Samples to tokens and labels: what is learned, what is masked, what was cut off."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from loraforge.errors import TrainingError
from loraforge.training.batches import IGNORED
from loraforge.training.data.formats import Message, Sample

Mask = Literal["prompt", "last", "none"]
MASKS: tuple[Mask, ...] = ("prompt", "last", "none")
Segment = tuple[str, bool]
"""A text, and whether it is learned."""


class Tokenizer(Protocol):
    """What data needs of a tokenizer. ``bos`` and ``eos`` are added here, so ``encode`` must add neither."""

    bos: int | None
    eos: int | None
    pad: int

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, and no others."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens."""

    def chat(self, messages: Sequence[Message]) -> list[Segment]:
        """Return a chat as the texts it is written in; of the assistant's turns the answers are learned."""


class Bytes:
    """ByT5's tokens: 0 pads, 1 ends, and byte b is b + 3. Chats are written as ChatML."""

    bos: int | None = None
    eos: int | None = 1
    pad = 0
    size = 259

    def encode(self, text: str) -> list[int]:
        """Return one token a byte of UTF-8."""
        return [byte + 3 for byte in text.encode()]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text; what is no byte is left out."""
        return bytes(i - 3 for i in ids if 3 <= i < self.size).decode(errors="replace")

    def chat(self, messages: Sequence[Message]) -> list[Segment]:
        """Write ``<|im_start|>role``, the content and ``<|im_end|>`` on lines of their own."""
        found: list[Segment] = []
        for message in messages:
            answer = message.role == "assistant"
            found += [(f"<|im_start|>{message.role}\n", False), (f"{message.content}<|im_end|>", answer), ("\n", False)]
        return found


@dataclass(frozen=True, slots=True)
class Row:
    """One sample as tokens, with a label for each: the token itself, or -100 where it is not learned."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Counted:
    """All rows, and how many samples were cut to the greatest length or left out because nothing to learn was left."""

    rows: tuple[Row, ...]
    truncated: int
    skipped: int


def tokenize(samples: Iterable[Sample], tokenizer: Tokenizer, max_length: int, mask: Mask = "prompt") -> Counted:
    """Turn samples into rows of at most ``max_length`` tokens.

    Answers end in eos, which is learned; a sample that is cut has none, since it did not end there. The first token of
    a row is never learned: nothing precedes it.

    Raises:
        TrainingError: no sample has anything to learn.
    """
    rows: list[Row] = []
    truncated = skipped = 0
    for sample in samples:
        ids, labels = _encode(sample, tokenizer, mask)
        cut = len(ids) > max_length
        row = Row(tuple(ids[:max_length]), tuple(labels[:max_length]))
        if any(label != IGNORED for label in row.labels[1:]):
            rows.append(row)
            truncated += cut
        else:
            skipped += 1
    if not rows:
        raise TrainingError(
            f"all {skipped} samples have nothing to learn within {max_length} tokens: raise max_length, or look at mask"
        )
    return Counted(tuple(rows), truncated, skipped)


def _encode(sample: Sample, tokenizer: Tokenizer, mask: Mask) -> tuple[list[int], list[int]]:
    if sample.input_ids:
        return list(sample.input_ids), list(sample.labels)
    ids, labels = ([], []) if tokenizer.bos is None else ([tokenizer.bos], [IGNORED])
    for text, learned in _segments(sample, tokenizer, mask):
        tokens = tokenizer.encode(text)
        ids += tokens
        labels += tokens if learned else [IGNORED] * len(tokens)
    if ids[:2] == [tokenizer.bos] * 2:  # a chat template that writes bos itself
        ids, labels = ids[1:], labels[1:]
    if tokenizer.eos is not None and ids and ids[-1] != tokenizer.eos and not sample.messages:
        ids, labels = [*ids, tokenizer.eos], [*labels, tokenizer.eos]
    return ids, labels


def _segments(sample: Sample, tokenizer: Tokenizer, mask: Mask) -> list[Segment]:
    if not sample.messages:
        return [(sample.prompt, mask == "none"), (sample.text, True)]
    found = [(text, learned or mask == "none") for text, learned in tokenizer.chat(sample.messages)]
    if mask == "last":
        last = max(i for i, (_, learned) in enumerate(found) if learned)
        found = [(text, i == last) for i, (text, _) in enumerate(found)]
    return found


def show(row: Row, tokenizer: Tokenizer) -> str:
    """Return a row's text with what is learned in [[ ]], for people to check."""
    parts: list[str] = []
    start = 0
    learned = [label != IGNORED for label in row.labels]
    for end in range(1, len(learned) + 1):
        if end == len(learned) or learned[end] != learned[start]:
            text = tokenizer.decode(row.ids[start:end])
            parts.append(f"[[{text}]]" if learned[start] else text)
            start = end
    return "".join(parts)
