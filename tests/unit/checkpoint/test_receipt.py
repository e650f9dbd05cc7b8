"""The receipt on disk: what was written is read, and any damage is seen."""

import os

import pytest
import torch
from blake3 import blake3

import loraforge as lf
from loraforge.checkpoint.container import Container, write_container
from loraforge.checkpoint.fidelity import Fidelity
from loraforge.checkpoint.reader import open_checkpoint
from loraforge.checkpoint.receipt import Receipt, ReceiptFile, Record, Used, checkpoint_digest, write_receipt
from loraforge.checkpoint.residual import ResidualWriter
from loraforge.errors import FormatError, ManifestError, NotFoundError
from loraforge_registry import canonical
from loraforge_registry.digest import Digest
from loraforge_registry.header import TensorEntry
from tests.checkpoints import a_base, adapter_for, raw, read_tensors, write_base

MAGIC = b"loraforge-receipt 1\n"


def digest(number, algorithm="blake3"):
    return Digest.from_raw(algorithm, bytes([number]) * 32)


def undo_record():
    import numpy as np

    writer = ResidualWriter(2)
    writer.add(0, np.array([2, 5]), np.array([1, -1], np.int16))
    return writer.encode()


def a_receipt(**more):
    undo = undo_record()
    figures = Fidelity(1.5, 0.25, 3, 12)
    entries = [TensorEntry(name, "BF16", (3, 4), 0, 24) for name in "ab"]
    records = {
        "a": Record(entries[0], digest(1), digest(2), "sum", b"", 0, len(undo), figures),
        "b": Record(entries[1], digest(3), digest(3)),
    }
    used = (Used("x", 0.5, digest(4, "sha256")), Used("y:v1", -1.0, digest(5, "sha256"), digest(6, "sha256")))
    return Receipt(used, "exact", records | more), undo


@pytest.fixture
def path(tmp_path):
    receipt, undo = a_receipt()
    write_receipt(tmp_path / "r", receipt, [undo])
    return tmp_path / "r"


def rewritten(path, edit):
    """Write the receipt again, whole and with the right digest, from a document that was edited."""
    container = Container(path, MAGIC)
    document = container.document
    edit(document)
    path.unlink()
    write_container(path, MAGIC, document, [undo_record()])


def test_round_trip(path):
    receipt, _ = a_receipt()
    file = ReceiptFile(path)
    assert file.receipt == receipt
    assert file.receipt.fidelity == Fidelity(1.5, 0.25, 3, 12)
    assert file.residual("a").places.tolist() == [2, 5]
    assert file.residual("a").differences.tolist() == [1, -1]
    assert [record.touched for record in file.receipt.records.values()] == [True, False]


def test_the_size_is_the_files(tmp_path):
    receipt, undo = a_receipt()
    assert write_receipt(tmp_path / "r", receipt, [undo[:3], undo[3:]]) == (tmp_path / "r").stat().st_size


def test_equal_merges_give_equal_bytes(tmp_path):
    receipt, undo = a_receipt()
    turned = Receipt(receipt.used, "exact", dict(reversed(receipt.records.items())))
    for name, given in (("one", receipt), ("two", turned)):
        write_receipt(tmp_path / name, given, [undo])
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_every_bit_counts(path):
    data = path.read_bytes()
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(FormatError, match="not a receipt that this version can read"):
            ReceiptFile(path)


def test_every_byte_that_is_missing_or_too_many_counts(path):
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(FormatError, match="not a receipt"):
            ReceiptFile(path)
    for more in (b"\0", data, bytes(5000)):
        path.write_bytes(data + more)
        with pytest.raises(FormatError, match="not a receipt"):
            ReceiptFile(path)


def test_none_is_there(tmp_path):
    with pytest.raises(NotFoundError):
        ReceiptFile(tmp_path / "r")


def test_a_document_that_announces_more_than_may_be_is_not_read(path):
    data = bytearray(path.read_bytes())
    data[len(MAGIC) : len(MAGIC) + 8] = (2**62).to_bytes(8, "little")
    path.write_bytes(data)
    with pytest.raises(FormatError, match="not a receipt"):
        ReceiptFile(path)


def row(document, name="a"):
    return next(fields for fields in document["tensors"] if fields[0] == name)


# whole files with right digests, and a document that no merge writes
EDITS = {
    "another schema": lambda d: d.update(schema="loraforge.receipt/2"),
    "a field more": lambda d: d.update(tensors=5),
    "no tensors": lambda d: d.pop("tensors"),
    "no adapters": lambda d: d.pop("adapters"),
    "an adapter that is none": lambda d: d["adapters"].append("x"),
    "a weight that is text": lambda d: d["adapters"][0].update(weight="1"),
    "a content id that is short": lambda d: d["adapters"][0].update(content_id=b"x"),
    "a tensor that is none": lambda d: d["tensors"].append(5),
    "a tensor without a digest": lambda d: row(d).pop(3),
    "a digest that is short": lambda d: row(d).__setitem__(3, b"x"),
    "a touched tensor without figures": lambda d: row(d).pop(),
    "figures of another type": lambda d: row(d).__setitem__(9, ["x", 1.0, 1, 1]),
    "a type that nobody knows": lambda d: row(d).__setitem__(1, "F31"),
    "a name that is a number": lambda d: row(d).__setitem__(0, 5),
    "a place that is text": lambda d: row(d).__setitem__(7, "0"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_document_of_another_form(edit, path):
    rewritten(path, EDITS[edit])
    with pytest.raises(FormatError, match="not a receipt that this version can read"):
        ReceiptFile(path)


def test_a_shape_of_other_things(path):
    rewritten(path, lambda d: row(d).__setitem__(2, [3, "x", 4]))
    with pytest.raises(FormatError):
        ReceiptFile(path)


@pytest.mark.parametrize(("begin", "size"), [(0, 10**9), (10**9, 5), (-1, 5), (3, -1), (-(2**62), 2**62)])
def test_an_undo_record_that_is_not_there(begin, size, path):
    rewritten(path, lambda d: row(d).__setitem__(slice(7, 9), [begin, size]))
    with pytest.raises(FormatError):
        ReceiptFile(path).residual("a")


def test_an_undo_record_of_another_tensor(path):
    rewritten(path, lambda d: row(d).__setitem__(2, [1, 4]))
    with pytest.raises(FormatError):
        ReceiptFile(path).residual("a")


def test_more_tensors_than_a_receipt_holds(tmp_path, monkeypatch):
    receipt, undo = a_receipt()
    monkeypatch.setattr("loraforge_registry.canonical.encode.__kwdefaults__", {"max_bytes": 100})
    with pytest.raises(FormatError, match=r"no receipt can hold 2 tensors.*--no-receipt"):
        write_receipt(tmp_path / "r", receipt, [undo])
    assert not os.listdir(tmp_path) or not ReceiptFileReads(tmp_path / "r")


def ReceiptFileReads(path):  # noqa: N802 - a word of its own
    try:
        ReceiptFile(path)
    except FormatError:
        return False
    return True


def test_container_gives_what_was_put_in(tmp_path):
    size = write_container(tmp_path / "c", b"magic\n", {"a": [1, b"x"]}, [b"abc", b"", b"defg"])
    container = Container(tmp_path / "c", b"magic\n")
    assert container.document == {"a": [1, b"x"]}
    assert [container.payload(0, 7), container.payload(2, 3), container.payload(7, 0)] == [b"abcdefg", b"cde", b""]
    data = (tmp_path / "c").read_bytes()
    assert len(data) == size
    assert data[-32:] == blake3(data[:-32]).digest()
    with pytest.raises(FormatError, match=r"no bytes 5 to 8"):
        container.payload(5, 3)
    with pytest.raises(FormatError, match="expected"):
        Container(tmp_path / "c", b"other\n")


def test_container_of_a_document_in_another_spelling(tmp_path):
    text = canonical.encode({"a": 1, "b": 2})
    other = b"\x82\xa1b\x02\xa1a\x01"  # the keys the other way round
    assert len(text) == len(other)
    data = b"magic\n" + len(other).to_bytes(8, "little") + other
    (tmp_path / "c").write_bytes(data + blake3(data).digest())
    with pytest.raises(ManifestError, match="not canonical"):
        Container(tmp_path / "c", b"magic\n")


# --- what a merge writes ----------------------------------------------------------------------------------------------


def test_digests_are_those_of_the_bytes(tmp_path):
    tensors = a_base()
    adapters = [adapter_for(tensors), adapter_for(tensors, seed=1)]
    base = write_base(tmp_path / "base", tensors)
    result = lf.merge(base, [(adapters[0], 0.5), (adapters[1], -2)], tmp_path / "merged")
    receipt, merged = ReceiptFile(tmp_path / "merged" / "loraforge.receipt").receipt, read_tensors(tmp_path / "merged")
    for name, record in receipt.records.items():
        assert record.before == Digest.from_raw("blake3", blake3(raw(tensors[name])).digest())
        assert record.after == Digest.from_raw("blake3", blake3(raw(merged[name])).digest())
        assert record.touched == (raw(tensors[name]) != raw(merged[name]))
    assert [(used.label, used.weight) for used in receipt.used] == [("adapter 1", 0.5), ("adapter 2", -2.0)]
    assert [used.content_id for used in receipt.used] == [lf.content_id(adapter) for adapter in adapters]
    assert (result.base, result.merged) == (receipt.base, receipt.merged)


def test_a_models_digest_is_that_of_its_tensors_not_of_its_files(tmp_path):
    tensors = a_base()
    base = write_base(tmp_path / "base", tensors)

    def found(folder):
        with open_checkpoint(folder) as checkpoint:
            places = checkpoint.tensors.values()
            return checkpoint_digest((t.entry, digest(1)) for t in sorted(places, key=lambda t: t.begin))

    turned = write_base(tmp_path / "turned", dict(reversed(tensors.items())))
    assert found(base) == found(turned)
    other = write_base(tmp_path / "other", tensors | {"model.steps": torch.tensor([[7]])})
    assert found(base) != found(other)


def test_a_reference_keeps_its_artifact(tmp_path):
    tensors = a_base()
    base, registry = write_base(tmp_path / "base", tensors), lf.Registry()
    stored = registry.push(adapter_for(tensors), "french:v1")
    lf.merge(base, "french:v1", tmp_path / "merged")
    (used,) = ReceiptFile(tmp_path / "merged" / "loraforge.receipt").receipt.used
    assert (used.label, used.digest) == ("french:v1", stored)
    lf.unmerge(tmp_path / "merged", tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
