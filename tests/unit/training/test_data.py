"""Data: formats by their keys, what is learned and what is masked, every row once an epoch, packing that isolates."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import loraforge as lf
from loraforge.errors import FormatError, NotFoundError, TrainingError
from loraforge.training import TrainConfig, train
from loraforge.training.batches import IGNORED, count_labels
from loraforge.training.data.formats import Message, Sample, read_samples
from loraforge.training.data.loader import best_fit, make_loader, packed, padded
from loraforge.training.data.tokens import Bytes, Row, show, tokenize
from loraforge.training.step import window_gradient
from tests.conformance.peft_cases import make


@pytest.fixture(autouse=True)
def _one_thread():
    """Small tensors on a busy machine: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
TURNS = (Message("user", "Hi"), Message("assistant", "Yes"))


def write(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


@pytest.mark.parametrize(
    ("line", "sample"),
    [
        ({"messages": CHAT, "source": 1}, Sample(messages=TURNS)),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]},
            Sample(messages=TURNS),
        ),
        ({"instruction": "Add", "input": "", "output": "3"}, Sample(prompt="Add\n\n", text="3")),
        ({"instruction": "Add", "input": "1 2", "output": "3"}, Sample(prompt="Add\n\n1 2\n\n", text="3")),
        ({"prompt": "Q", "completion": "A"}, Sample(prompt="Q", text="A")),
        ({"input": "Q", "output": "A"}, Sample(prompt="Q", text="A")),
        ({"text": "words"}, Sample(text="words")),
        ({"input_ids": [1, 2], "labels": [-100, 2]}, Sample(input_ids=(1, 2), labels=(-100, 2))),
        ({"input_ids": [1, 2]}, Sample(input_ids=(1, 2), labels=(1, 2))),
    ],
)
def test_formats_are_known_by_their_keys(line, sample, tmp_path):
    assert read_samples(write(tmp_path / "d.jsonl", line, "", line)) == [sample, sample]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{"], r"d\.jsonl:1: Expecting property name"),
        ([{"text": "a"}, "[1]"], r"d\.jsonl:2: is list, expected an object"),
        (
            [{"text": "a"}, "", {"prompt": "a", "completion": "b"}],
            r":3: has the keys of 'prompt\+completion', lines before",
        ),
        ([{"question": "a", "answer": "b"}], r":1: has the keys answer, question; expected messages"),
        ([{"text": 3}], r":1: text is int, expected text"),
        ([{"messages": []}], r":1: messages is not a list of turns"),
        (
            [{"messages": [{"role": "robot", "content": ""}]}],
            r":1: messages: a turn's role is 'robot', expected one of",
        ),
        ([{"messages": CHAT[:1]}], r":1: messages has no turn of the assistant"),
        ([{"messages": [{"role": "user", "content": [1]}]}], r":1: content is list, expected text"),
        ([{"input_ids": [1, 2], "labels": [1]}], r":1: 2 input_ids and 1 labels"),
        ([{"input_ids": [1, True]}], r":1: input_ids is not a list of whole numbers"),
        (["[" * 100_000], r"d\.jsonl:1:"),
        ([], r"no line with a sample"),
    ],
)
def test_bad_lines_are_named(lines, message, tmp_path):
    with pytest.raises(FormatError, match=message):
        read_samples(write(tmp_path / "d.jsonl", *lines))


def test_missing_and_binary_files_are_named(tmp_path):
    with pytest.raises(NotFoundError, match="no such file"):
        read_samples(tmp_path / "none.jsonl")
    (tmp_path / "b").write_bytes(b"\xff\xfe")
    with pytest.raises(FormatError, match="not UTF-8 at byte 0"):
        read_samples(tmp_path / "b")


def shown(sample, mask="prompt", length=1000):
    return [show(row, Bytes()) for row in tokenize([sample], Bytes(), length, mask).rows]


LONG = Sample(messages=(*TURNS, Message("user", "So"), Message("assistant", "No")))


@pytest.mark.parametrize(
    ("sample", "mask", "text"),
    [
        (Sample(prompt="Q", text="A"), "prompt", "Q[[A]]"),
        (Sample(prompt="Q", text="A"), "none", "[[QA]]"),
        (Sample(text="words"), "prompt", "[[words]]"),
        (
            LONG,
            "prompt",
            (
                "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n[[Yes<|im_end|>]]\n<|im_start|>user\nSo<|im_end|>\n"
                "<|im_start|>assistant\n[[No<|im_end|>]]\n"
            ),
        ),
        (
            LONG,
            "last",
            (
                "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n<|im_start|>user\nSo<|im_end|>\n"
                "<|im_start|>assistant\n[[No<|im_end|>]]\n"
            ),
        ),
    ],
)
def test_what_is_learned_is_shown(sample, mask, text):
    assert shown(sample, mask) == [text]


def test_an_answer_ends_in_a_learned_eos_unless_it_was_cut():
    whole = tokenize([Sample(prompt="Q", text="AB")], Bytes(), 4)
    assert (whole.rows[0].ids[-1], whole.rows[0].labels[-1]) == (1, 1)
    cut = tokenize([Sample(prompt="Q", text="AB"), Sample(prompt="long", text="x")], Bytes(), 3)
    assert [row.ids for row in cut.rows] == [(ord("Q") + 3, ord("A") + 3, ord("B") + 3)]
    assert (cut.truncated, cut.skipped) == (1, 1)
    with pytest.raises(TrainingError, match="all 1 samples have nothing to learn within 4 tokens"):
        tokenize([Sample(prompt="long", text="x")], Bytes(), 4)


def test_eos_is_learned_where_it_is_also_the_padding():
    class SamePad(Bytes):
        pad = 1

    row = tokenize([Sample(text="ab")], SamePad(), 10).rows[0]
    batch = padded([row, Row(row.ids * 2, row.labels * 2)], SamePad.pad)
    assert batch["labels"][0].tolist() == [*row.labels, *[IGNORED] * 3]
    assert batch["attention_mask"][0].tolist() == [1, 1, 1, 0, 0, 0]


def test_there_is_one_bos():
    class WithBos(Bytes):
        bos = 2

        def chat(self, messages):
            return [("\x00", False), *super().chat(messages)]

        def encode(self, text):
            return [2 if byte == 3 else byte for byte in super().encode(text)]

    for sample in (Sample(prompt="Q", text="A"), Sample(messages=TURNS)):
        row = tokenize([sample], WithBos(), 1000).rows[0]
        assert row.ids.count(2) == 1
        assert (row.ids[0], row.labels[0]) == (2, IGNORED)


@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=60), capacity=st.integers(20, 40))
def test_bins_hold_every_row_once_and_are_not_overfull(lengths, capacity):
    bins = best_fit(lengths, capacity)
    assert sorted(row for found in bins for row in found) == list(range(len(lengths)))
    loads = [sum(lengths[row] for row in found) for found in bins]
    assert max(loads) <= capacity
    assert sum(load <= capacity / 2 for load in loads) <= 1, "two half-empty bins would have been one"


def rows(count=23):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 12, (count,), generator=generator).tolist()
    found = [tuple(torch.randint(3, 32, (length,), generator=generator).tolist()) for length in lengths]
    return [Row(ids, (IGNORED, *ids[1:])) for ids in found]


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_every_row_is_in_every_epoch_once(dtype, grouped):
    loader = make_loader(rows(), 4, seed=3, pad=0, max_length=24, pack_dtype=dtype, grouped=grouped)
    orders = []
    for epoch in (0, 1, 0):
        batches = loader.epoch(epoch)
        assert len(list(batches)) == len(loader)
        labels = torch.cat([batch["labels"].flatten() for batch in batches])
        orders.append(labels[labels != IGNORED].tolist())
    assert orders[0] == orders[2]
    assert orders[0] != orders[1]
    expected = sorted(label for row in rows() for label in row.labels if label != IGNORED)
    assert sorted(orders[0]) == sorted(orders[1]) == expected


def test_grouped_rows_leave_less_to_fill_up_and_are_still_shuffled():
    many = [Row((5,) * length, (5,) * length) for length in range(2, 402)]
    filled, widths = {}, {}
    for grouped in (False, True):
        batches = list(make_loader(many, 4, seed=0, pad=0, max_length=999, grouped=grouped).epoch(0))
        filled[grouped] = sum(int((batch["attention_mask"] == 0).sum()) for batch in batches)
        widths[grouped] = [batch["input_ids"].shape[1] for batch in batches]
    assert filled[True] < filled[False] / 10
    longer = sum(second > first for first, second in itertools.pairwise(widths[True]))
    assert 30 < longer < 70, "batches come in no order of length"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_do_not_see_each_other(attention):
    """Loss and gradient of a packed line are those of its rows one by one."""
    torch.manual_seed(0)
    model = make.llama(num_hidden_layers=2, attn_implementation=attention)()
    lf.inject(model, lf.LoraConfig(rank=4, init="gaussian"))
    for name, parameter in model.named_parameters():
        if name.endswith("lora.b"):
            torch.nn.init.normal_(parameter, std=0.2)
    data = rows()
    found = []
    lines = [[data[row] for row in line] for line in best_fit([len(row.ids) for row in data], 24)]
    assert len(lines) < len(data) / 2
    for batches in ([padded([row], 0) for row in data], [packed(lines, 0, torch.float32)], [padded(data, 0)]):
        model.zero_grad()
        loss, labels = window_gradient(model, batches, count_labels, None)
        found.append((loss, labels, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    for loss, labels, gradient in found[1:]:
        assert labels == found[0][1]
        assert loss == pytest.approx(found[0][0], rel=1e-6)
        assert float((gradient - found[0][2]).norm() / found[0][2].norm()) < 1e-5


@pytest.mark.parametrize("options", [{"pack_dtype": torch.float32}, {"grouped": True}], ids=["packed", "grouped"])
def test_resume_with_packing_ends_in_the_same_bits(options, tmp_path):
    torch.manual_seed(0)
    model = make.llama()()
    config = TrainConfig(rank=2, lr=1e-2, dropout=0.1, epochs=5, grad_accum=2, save_every=1)
    loader = make_loader(rows(), 1 if "pack_dtype" in options else 3, seed=0, pad=0, max_length=24, **options)
    seen = []
    whole = train(model, loader, config, on_step=seen.append)
    for step in range(len(seen)):
        parts = train(model, loader, config, run=tmp_path / "run", resume=step > 0, should_stop=lambda: True)
    assert lf.content_id(parts) == lf.content_id(whole)
    assert lf.content_id(train(model, loader, replace(config, seed=1))) != lf.content_id(whole)
