"""Merge and unmerge over every element type, size of update and number of adapters; what others do to files between."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

import loraforge as lf
from loraforge.adapter import Adapter, LowRank
from loraforge.checkpoint import journal, output
from loraforge.checkpoint.reader import open_checkpoint
from loraforge.checkpoint.receipt import ReceiptFile
from loraforge.errors import (
    CompositionError,
    ConflictError,
    FormatError,
    InputOutputError,
    NotFoundError,
    NumericalError,
)
from loraforge_registry.config import Settings
from tests.checkpoints import (
    NAMES,
    TOUCHED,
    a_base,
    adapter_for,
    assert_same,
    awkward,
    normal,
    raw,
    read_tensors,
    saved,
    snapshot,
    write_base,
    write_shards,
)

Q, V = (f"{target}.weight" for target in TOUCHED)
dtypes = pytest.mark.parametrize("dtype", NAMES.values(), ids=list(NAMES))


@pytest.fixture
def home(tmp_path):
    """A directory with nothing else in it."""
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


@pytest.fixture(autouse=True)
def _not_durable(monkeypatch):
    """Nothing here dies in between, and waiting for the disk would take most of the time."""
    monkeypatch.setattr(output.os, "fsync", lambda _: None)


def weights(directory):
    return (directory / "model.safetensors").read_bytes()


def receipt_of(directory):
    return ReceiptFile(directory / "loraforge.receipt")


# --- bit for bit ------------------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("ratio", [1e-4, 1e-3, 5e-3, 0.1, 1.0])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_there_and_back(dtype, ratio, count, home):
    tensors = a_base(dtype)
    base = write_base(home / "base", tensors)
    ranks = [4, 1, 8, 3, 2][:count]
    adapters = [adapter_for(tensors, ratio, rank, seed) for seed, rank in enumerate(ranks)]
    given = [(adapter, weight) for adapter, weight in zip(adapters, [1.0, -0.5, 0.3, 2.0, 1e-3], strict=False)]
    lf.merge(base, given, home / "merged")
    merged = read_tensors(home / "merged")
    assert [name for name in tensors if raw(merged[name]) != raw(tensors[name])] == [Q, V]
    flipped = torch.signbit(merged[V]) != torch.signbit(tensors[V])
    assert ratio < 1 or flipped[tensors[V] != 0].any()
    result = lf.unmerge(home / "merged", home / "back", adapters=adapters)
    assert weights(home / "back") == weights(base)
    assert (home / "back" / "config.json").exists()
    assert result.base == result.merged == receipt_of(home / "merged").receipt.base


@dtypes
def test_powers_of_two_whose_lower_neighbour_is_nearer(dtype, home):
    """Where unmerging by arithmetic alone goes wrong most."""
    powers = torch.exp2(torch.randint(-9, 3, (64, 96), generator=torch.Generator().manual_seed(1)).double())
    tensors = {"q.weight": (powers * (1 - 2 * (torch.arange(96) % 2))).to(dtype)}
    base = write_base(home / "base", tensors)
    for ratio in (torch.finfo(dtype).eps / 4, torch.finfo(dtype).eps, 0.3):
        adapter = adapter_for(tensors, ratio, targets=["q"])
        lf.merge(base, adapter, home / f"merged {ratio}")
        lf.unmerge(home / f"merged {ratio}", home / f"back {ratio}", adapters=[adapter])
        assert weights(home / f"back {ratio}") == weights(base)


@pytest.mark.parametrize("kind", NAMES.values(), ids=list(NAMES))
@pytest.mark.parametrize("rank", [1, 4])
def test_an_adapter_is_only_read(kind, rank, home):
    """Of whatever type its factors are; that of the sums as well."""
    tensors = a_base(torch.bfloat16)
    base = write_base(home / "base", tensors)
    pairs = {
        target: replace(pair, a=pair.a.to(kind), b=pair.b.to(kind))
        for target, pair in adapter_for(tensors, 0.1, rank).targets.items()
    }
    adapter = Adapter(pairs)
    factors = {target: (raw(pair.a), raw(pair.b)) for target, pair in pairs.items()}
    for out in ("once", "twice"):
        lf.merge(base, [(adapter, 0.3)], home / out)
        assert {target: (raw(pair.a), raw(pair.b)) for target, pair in pairs.items()} == factors
        exact = tensors[Q].double() + 0.3 * pairs[TOUCHED[0]].delta()
        torch.testing.assert_close(read_tensors(home / out)[Q].double(), exact, rtol=2**-8, atol=0)
    lf.unmerge(home / "once", home / "back", adapters=[adapter])
    assert weights(home / "back") == weights(base)


def every_kind_of_change():
    """A base, and an adapter that adds, replaces, sets rows and biases, with one shard's tensor of many blocks."""
    tensors = {
        "big.weight": normal(700, 400, seed=1, dtype=torch.bfloat16),  # three blocks
        "emb.weight": normal(50, 16, seed=2, dtype=torch.bfloat16),
        "conv.weight": normal(8, 6, 3, 2, seed=3, dtype=torch.bfloat16),
        "conv.bias": normal(8, seed=4, dtype=torch.bfloat16),
        "head.weight": normal(10, 16, seed=5, dtype=torch.float16),
        "head.bias": awkward(torch.float32, 1, 10).reshape(10),
        "scalar": torch.tensor(2.5),
        "none.weight": torch.zeros(0, 4),
    }
    emb = LowRank("embedding", normal(2, 50, seed=7), normal(16, 2, seed=8), alpha=4.0)
    conv_a, conv_b = normal(3, 6, 3, 2, seed=9), normal(8, 3, 1, 1, seed=10)
    conv = LowRank("conv2d", conv_a, conv_b, alpha=5.0)
    big = adapter_for(tensors, 0.01, rank=8, targets=["big"]).targets["big"]
    head = {"head.weight": normal(10, 16, seed=12), "head.bias": normal(10, seed=13)}
    settings = Settings(modules_to_save=("head",))
    return tensors, Adapter({"big": big, "emb": emb, "conv": conv}, settings, extras=head)


@pytest.mark.parametrize("threads", ["1", "3"])
def test_unmerged_by_another_process_with_other_threads(threads, home):
    tensors, adapter = every_kind_of_change()
    base = write_base(home / "base", tensors)
    magnitude = tensors["big.weight"].double().norm(dim=1).float() * 1.1
    dora = Adapter({"big": LowRank("linear", normal(2, 400), normal(700, 2, seed=1), 2.0, magnitude=magnitude)})
    lf.merge(base, adapter, home / "merged")
    lf.merge(base, dora, home / "scaled")
    script = (
        "import os, sys, torch; import loraforge as lf; from loraforge.checkpoint import engine\n"
        "os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])\n"
        "torch.set_num_threads(int(sys.argv[1])); engine.BLOCK = 4321\n"
        "for merged, back, adapter in (sys.argv[2:5], sys.argv[5:8]):\n"
        "    lf.unmerge(merged, back, adapters=[adapter])\n"
    )
    lf_adapter, lf_dora = saved(adapter, home / "adapter"), saved(dora, home / "dora")
    arguments = [home / "merged", home / "back", lf_adapter, home / "scaled", home / "back2", lf_dora]
    environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    subprocess.run([sys.executable, "-c", script, threads, *map(str, arguments)], check=True, env=environment)
    assert weights(home / "back") == weights(home / "back2") == weights(base)


def test_the_same_merge_gives_the_same_bytes_whatever_the_blocks(home, monkeypatch):
    tensors, adapter = every_kind_of_change()
    base = write_base(home / "base", tensors)
    lf.merge(base, adapter, home / "one")
    monkeypatch.setattr("loraforge.checkpoint.engine.BLOCK", 999)
    monkeypatch.setattr("loraforge.checkpoint.engine.MAX_WORKERS", 1)
    lf.merge(base, adapter, home / "two")
    assert weights(home / "one") == weights(home / "two")
    one, two = (receipt_of(home / name) for name in ("one", "two"))
    assert one.receipt.merged == two.receipt.merged
    for name, record in one.receipt.records.items():
        if record.touched:
            found = [file.residual(name) for file in (one, two)]
            assert (found[0].places == found[1].places).all()
            assert (found[0].differences == found[1].differences).all()


# --- what other programs do to the files in between -------------------------------------------------------------------


@pytest.mark.parametrize("how", ["another order", "shards", "one tensor a shard"])
def test_saved_again_by_another_tool(how, home):
    tensors, adapter = every_kind_of_change()
    lf.merge(write_base(home / "base", tensors), adapter, home / "merged")
    found, again = read_tensors(home / "merged"), home / "again"
    if how == "another order":
        again.mkdir()
        names = sorted(found, reverse=True)
        save_file({name: found[name] for name in names}, again / "weights.safetensors", metadata={"by": "another"})
    else:
        names = list(found)
        groups = [[name] for name in names] if how == "one tensor a shard" else [names[:3], names[3:]]
        write_shards(again, [{name: found[name] for name in group} for group in groups])
    receipt = home / "merged" / "loraforge.receipt"
    assert lf.verify_merge(again, adapters=[adapter], receipt=receipt).holds
    lf.unmerge(again, home / "back", adapters=[adapter], receipt=receipt)
    assert_same(read_tensors(home / "back"), tensors)
    assert sorted(p.name for p in (home / "back").iterdir()) == sorted(p.name for p in again.iterdir())
    with pytest.raises(NotFoundError, match="receipt"):
        lf.unmerge(again, home / "never", adapters=[adapter])


@pytest.mark.parametrize("what", ["missing", "surplus", "type", "shape"])
def test_a_checkpoint_of_other_tensors_is_not_the_receipts(what, home):
    tensors = a_base()
    adapter = adapter_for(tensors)
    lf.merge(write_base(home / "base", tensors), adapter, home / "merged")
    found = read_tensors(home / "merged")
    if what == "missing":
        del found["model.embed.weight"]
    elif what == "surplus":
        found["model.extra"] = torch.ones(2)
    else:
        name = "model.layers.0.q.bias"
        found[name] = found[name].float() if what == "type" else found[name].reshape(1, -1)
    write_base(home / "merged", found)
    before = snapshot(home)
    with pytest.raises(ConflictError, match=r"embed|extra|bias"):
        lf.unmerge(home / "merged", home / "back", adapters=[adapter])
    with pytest.raises(ConflictError, match=r"embed|extra|bias"):
        lf.unmerge_in_place(home / "merged", adapters=[adapter])
    assert snapshot(home) == before
    assert len(lf.verify_merge(home / "merged").differences) == 1


# --- some of them -----------------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("only", [["b"], ["a", "c"], ["c"]])
@pytest.mark.parametrize("compute", ["exact", "float32"])
def test_only_some_is_a_merge_of_the_rest_to_the_byte(dtype, only, compute, home, monkeypatch):
    tensors = a_base(dtype)
    base = write_base(home / "base", tensors)
    monkeypatch.chdir(home)
    targets = {"a": TOUCHED, "b": TOUCHED[:1], "c": TOUCHED[1:]}
    for seed, name in enumerate("abc"):
        saved(adapter_for(tensors, 0.05, rank=seed + 2, seed=seed, targets=targets[name]), home / name)
    used = {"./a": 1.0, "./b": -0.5, "./c": 0.25}
    lf.merge(base, list(used.items()), home / "all", compute=compute)
    lf.unmerge(home / "all", home / "rest", only=[f"./{name}" for name in only], adapters=list(used))
    rest = [(path, weight) for path, weight in used.items() if path[2:] not in only]
    lf.merge(base, rest, home / "expected", compute=compute)
    assert weights(home / "rest") == weights(home / "expected")
    kept, wanted = (receipt_of(home / name).receipt for name in ("rest", "expected"))
    assert kept.used == wanted.used
    touched = {name for name, record in wanted.records.items() if record.touched}
    for name in touched:
        assert kept.records[name] == wanted.records[name], name
    for name, record in kept.records.items():
        assert (record.before, record.after) == (wanted.records[name].before, wanted.records[name].after), name
    lf.unmerge(home / "rest", home / "back", adapters=list(used))
    assert weights(home / "back") == weights(base)


def test_only_asks_for_what_is_there(home):
    tensors = a_base()
    adapters = [adapter_for(tensors, seed=seed) for seed in range(2)]
    lf.merge(write_base(home / "base", tensors), adapters, home / "merged")
    before = snapshot(home)
    with pytest.raises(NotFoundError, match="'nobody'; it has adapter 1, adapter 2"):
        lf.unmerge(home / "merged", home / "back", only="nobody", adapters=adapters)
    assert snapshot(home) == before
    digest = str(lf.content_id(adapters[0]))
    lf.unmerge(home / "merged", home / "rest", only=digest, adapters=adapters)
    assert [used.label for used in receipt_of(home / "rest").receipt.used] == ["adapter 2"]


# --- nothing to do ----------------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("compute", ["exact", "float32"])
def test_what_adds_nothing_changes_no_bit(dtype, compute, home):
    tensors = {"q.weight": awkward(dtype, 40, 60)}
    base = write_base(home / "base", tensors)
    adapter = adapter_for(tensors, 0.1, targets=["q"])
    pair = adapter.targets["q"]
    nothing = Adapter({"q": LowRank("linear", pair.a, torch.zeros_like(pair.b), 4.0)})
    cases = {"weight 0": [(adapter, 0.0)], "weight -0": [(adapter, -0.0)], "zero": nothing, "both": [nothing, nothing]}
    for name, given in cases.items():
        if compute == "float32" and name == "weight -0":
            continue
        result = lf.merge(base, given, home / name, compute=compute)
        if compute == "exact":
            assert weights(home / name) == weights(base), name
            assert result.base == result.merged
            assert result.fidelity.error == 0
            assert result.fidelity.share_changed == 0
        back = [adapter, nothing]
        lf.unmerge(home / name, home / f"{name} back", adapters=back)
        assert weights(home / f"{name} back") == weights(base)


def test_two_that_cancel_change_no_bit(home):
    tensors = {"q.weight": normal(40, 60, dtype=torch.bfloat16)}
    tensors["q.weight"][:2] = torch.tensor([0.0, -0.0]).repeat(30)
    base = write_base(home / "base", tensors)
    adapter = adapter_for(tensors, 0.5, targets=["q"])
    lf.merge(base, [(adapter, 0.7), (adapter, -0.7)], home / "merged")
    assert weights(home / "merged") == weights(base)


# --- what is refused, and that nothing is left ------------------------------------------------------------------------


def refuses(home, kind, match, base, adapters, **options):
    before = snapshot(home)
    with pytest.raises(kind, match=match):
        lf.merge(base, adapters, home / "merged", **options)
    assert snapshot(home) == before
    with pytest.raises(kind, match=match):
        lf.merge_in_place(base, adapters, **options)
    assert snapshot(home) == before


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("compute", ["exact", "float32"])
def test_no_number_in_the_base(value, compute, home):
    tensors = a_base()
    adapter = adapter_for(tensors)
    tensors[Q][7, 5] = value
    base = write_base(home / "base", tensors)
    refuses(home, NumericalError, rf"'{Q}' at \[7, 5\]: the base holds {value}", base, adapter, compute=compute)


@dtypes
def test_no_number_where_no_adapter_goes_comes_along(dtype, home):
    tensors = a_base(dtype)
    tensors["model.embed.weight"][0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    base, adapter = write_base(home / "base", tensors), adapter_for(tensors)
    lf.merge(base, adapter, home / "merged")
    assert raw(read_tensors(home / "merged")["model.embed.weight"]) == raw(tensors["model.embed.weight"])
    lf.unmerge(home / "merged", home / "back", adapters=[adapter])
    assert weights(home / "back") == weights(base)


@pytest.mark.parametrize("factor", ["a", "b", "bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_number_in_an_adapter(factor, value, home):
    tensors = a_base()
    adapter = adapter_for(tensors, targets=TOUCHED[:1])
    pair = adapter.targets[TOUCHED[0]]
    pair = LowRank("linear", pair.a, pair.b, pair.alpha, bias=torch.zeros(40))
    getattr(pair, factor).view(-1)[3] = value
    bad = Adapter({TOUCHED[0]: pair})
    name = factor.upper() if factor != "bias" else factor
    refuses(home, NumericalError, rf"{TOUCHED[0]}.*{name} holds {value}", write_base(home / "base", tensors), bad)


def test_beyond_what_the_type_can_hold(home):
    tensors = a_base(torch.float16)
    tensors[Q][3, 4] = 65504.0
    base = write_base(home / "base", tensors)
    a, b = torch.zeros(1, 24), torch.zeros(40, 1)
    a[0, 4], b[3, 0] = 1, 16
    small, enough = (Adapter({TOUCHED[0]: LowRank("linear", a, b * factor, 1.0)}) for factor in (0.999, 1.0))
    refuses(home, NumericalError, rf"'{Q}' at \[3, 4\]: 65504 would become inf, beyond what F16", base, enough)
    lf.merge(base, small, home / "merged")
    assert weights(home / "merged") == weights(base)


def test_infinite_weights(home):
    tensors = a_base()
    base, adapter = write_base(home / "base", tensors), adapter_for(tensors)
    for weight in (float("nan"), float("inf")):
        refuses(home, CompositionError, "finite", base, [(adapter, weight)])


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_quantised_tensor(dtype, home):
    tensors = a_base()
    adapter = adapter_for(tensors)
    tensors[Q] = torch.ones(40, 24).to(dtype)
    refuses(home, CompositionError, f"'{Q}' is .*quantised", write_base(home / "base", tensors), adapter)


@pytest.mark.parametrize("suffix", [".qweight", ".weight_packed"])
def test_a_packed_tensor(suffix, home):
    tensors = a_base()
    adapter = adapter_for(tensors)
    del tensors[Q]
    tensors[TOUCHED[0] + suffix] = torch.ones(3, 40, dtype=torch.int32)
    refuses(home, CompositionError, "quantised", write_base(home / "base", tensors), adapter)


def test_shapes_and_targets(home):
    tensors = a_base()
    base = write_base(home / "base", tensors)
    pair = adapter_for(tensors).targets[TOUCHED[0]]
    wide = Adapter({TOUCHED[0]: LowRank("linear", torch.ones(1, 25), torch.ones(40, 1), 1.0)})
    refuses(home, CompositionError, r"shape \[40, 25\], the base's .* has \[40, 24\]", base, wide)
    refuses(home, CompositionError, "have no tensor in the base", base, Adapter({"model.layers.9.q": pair}))
    bias = LowRank("linear", pair.a, pair.b, 1.0, bias=torch.ones(39))
    refuses(home, CompositionError, "the bias of target", base, Adapter({TOUCHED[0]: bias}))
    grouped = LowRank("conv2d", torch.ones(4, 2, 1, 1), torch.ones(40, 2, 1, 1), 1.0)
    refuses(home, CompositionError, "grouped", base, Adapter({TOUCHED[0]: grouped}))
    refuses(home, CompositionError, "no adapters", base, [])
    refuses(home, CompositionError, "compute is 'double'", base, Adapter({TOUCHED[0]: pair}), compute="double")


def test_what_is_not_additive(home):
    tensors = a_base()
    base = write_base(home / "base", tensors)
    pair = adapter_for(tensors, targets=TOUCHED[:1]).targets[TOUCHED[0]]
    plain = Adapter({TOUCHED[0]: pair})
    dora = Adapter({TOUCHED[0]: LowRank("linear", pair.a, pair.b, 1.0, magnitude=torch.ones(40))})
    whole = Adapter({TOUCHED[0]: pair}, extras={"model.embed.weight": torch.ones(30, 24)})
    refuses(home, CompositionError, "DoRA, which cannot be weighted by 0.5", base, [(dora, 0.5)])
    refuses(home, CompositionError, "whole saved tensors, which cannot be weighted", base, [(whole, 2.0)])
    refuses(home, CompositionError, "uses DoRA", base, dora, compute="float32")
    refuses(home, CompositionError, "DoRA magnitude .* do not agree", base, [dora, plain])
    refuses(home, CompositionError, "DoRA magnitude .* do not agree", base, [dora, dora])
    other = Adapter({}, extras={"model.embed.weight": torch.zeros(30, 24)})
    refuses(home, CompositionError, "a whole saved tensor .* do not agree", base, [whole, other])
    lf.merge(base, [whole, whole], home / "merged")  # they agree on what they replace
    assert (read_tensors(home / "merged")["model.embed.weight"] == 1).all()
    lf.unmerge(home / "merged", home / "back", adapters=[whole])
    assert weights(home / "back") == weights(base)


def test_an_initialisation_that_changed_the_base(home):
    tensors = a_base()
    pissa = Adapter(adapter_for(tensors).targets, Settings(base_mutating_init="pissa"))
    refuses(home, CompositionError, "initialised by pissa", write_base(home / "base", tensors), pissa)


# --- where the output may be ------------------------------------------------------------------------------------------


def test_the_output_is_no_input_and_takes_nobodys_place(home):
    tensors = a_base()
    base, adapter = write_base(home / "base", tensors), adapter_for(tensors)
    (home / "file").write_text("x")
    (home / "full").mkdir()
    (home / "full" / "something").write_text("x")
    (home / "link").symlink_to(home / "nowhere")
    (home / "into").symlink_to(base)
    before = snapshot(home)
    for out in ("base", "base/inside", "base/in/side", "file", "full", "link", "into/inside", "into", "../home/base"):
        with pytest.raises(ConflictError, match=r"exists already|inside the input"):
            lf.merge(base, adapter, home / out)
        assert snapshot(home) == before, out
    lf.merge(base, adapter, home / "merged")
    for out in ("merged", "merged/inside"):
        with pytest.raises(ConflictError, match=r"exists already|inside the input"):
            lf.unmerge(home / "merged", home / out, adapters=[adapter])
    (home / "empty").mkdir()
    lf.merge(base, adapter, home / "empty")
    assert weights(home / "empty") == weights(home / "merged")
    lf.merge(base / "model.safetensors", adapter, base / "beside")  # the input is the file alone
    assert weights(base / "beside") == weights(home / "merged")


def test_directories_above_the_output_are_made(home):
    tensors = a_base()
    base, adapter = write_base(home / "base", tensors), adapter_for(tensors)
    lf.merge(base, adapter, home / "a" / "b" / "merged")
    assert weights(home / "a" / "b" / "merged") != weights(base)
    assert os.listdir(home / "a" / "b") == ["merged"]


def test_a_single_file_becomes_a_directory(home):
    tensors = a_base()
    base, adapter = write_base(home / "base", tensors), adapter_for(tensors)
    (base / "model.safetensors").rename(base / "other name.safetensors")
    lf.merge(base / "other name.safetensors", adapter, home / "merged")
    assert sorted(os.listdir(home / "merged")) == ["loraforge.receipt", "other name.safetensors"]
    lf.unmerge(home / "merged", home / "back", adapters=[adapter])
    name = "other name.safetensors"
    assert (home / "back" / name).read_bytes() == (base / name).read_bytes()


def test_without_a_receipt(home):
    tensors = a_base()
    base, adapter = write_base(home / "base", tensors), adapter_for(tensors)
    result = lf.merge(base, adapter, home / "merged", receipt=False)
    lf.merge(base, adapter, home / "with")
    assert weights(home / "merged") == weights(home / "with")
    assert sorted(os.listdir(home / "merged")) == ["config.json", "model.safetensors"]
    assert (result.base, result.merged, result.receipt_size) == (None, None, 0)
    with pytest.raises(NotFoundError, match="there is no receipt"):
        lf.unmerge(home / "merged", home / "back", adapters=[adapter])
    with pytest.raises(NotFoundError, match="there is no receipt"):
        lf.verify_merge(home / "merged")


STALE = ["pytorch_model.bin", "model.gguf", "model.onnx", "tf_model.h5", "flax_model.msgpack", "consolidated.00.pth"]


def test_what_comes_along_and_what_does_not(home):
    tensors = a_base()
    parts = [{n: t for n, t in tensors.items() if (n == Q) == first} for first in (True, False)]
    base, adapter = write_shards(home / "base", parts), adapter_for(tensors)
    others = ["config.json", "generation_config.json", "tokenizer.json", "LICENSE", "model.py", "chat_template.jinja"]
    for name in [*others, *STALE, "old.safetensors"]:
        (base / name).write_bytes(name.encode())
    (base / "original").mkdir()
    for name in ("consolidated.00.pth", "params.json"):
        (base / "original" / name).write_text("of another format")
    result = lf.merge(base, adapter, home / "merged")
    assert sorted(result.left_out) == sorted([*STALE, "old.safetensors", "original/consolidated.00.pth"])
    index = "model.safetensors.index.json"
    shards = sorted(p.name for p in base.glob("model-*.safetensors"))
    assert sorted(os.listdir(home / "merged")) == sorted([*others, index, *shards, "loraforge.receipt"])
    for name in [*others, index]:
        assert (home / "merged" / name).read_bytes() == (base / name).read_bytes()
    for name in shards:
        length = 8 + int.from_bytes((base / name).read_bytes()[:8], "little")
        assert (home / "merged" / name).read_bytes()[:length] == (base / name).read_bytes()[:length]
    assert lf.preview_merge(base, adapter).left_out == result.left_out


def test_a_preview_writes_nothing_and_says_the_same(home):
    tensors, adapter = every_kind_of_change()
    base = write_base(home / "base", tensors)
    before = snapshot(home)
    said = lf.preview_merge(base, adapter)
    assert snapshot(home) == before
    done = lf.merge(base, adapter, home / "merged")
    assert said.tensors == done.tensors
    assert (said.untouched, said.nbytes, said.touched_bytes) == (done.untouched, done.nbytes, done.touched_bytes)
    assert (said.out, said.base, said.receipt_size) == (None, None, 0)
    assert done.untouched == 3


def test_progress_counts_every_byte_of_the_tensors(home):
    tensors, adapter = every_kind_of_change()
    seen = []
    result = lf.merge(write_base(home / "base", tensors), adapter, home / "merged", progress=seen.append)
    assert sum(seen) == result.nbytes > result.touched_bytes


def test_an_adapter_that_changes_while_it_is_merged_is_refused(home):
    tensors = a_base()
    lf.save(adapter_for(tensors), home / "adapter")
    weights = home / "adapter" / "adapter_model.safetensors"

    def overwrite(_):
        with weights.open("r+b") as file:
            file.seek(-4, os.SEEK_END)
            file.write(b"\x00\x00\x80\x3f")

    with pytest.raises(ConflictError, match="changed while it was read"):
        lf.merge(write_base(home / "base", tensors), home / "adapter", home / "merged", progress=overwrite)
    assert not (home / "merged").exists()


def test_the_receipt_is_the_same_without_the_compiled_pass(home, monkeypatch):
    tensors, adapter = every_kind_of_change()
    base = write_base(home / "base", tensors)
    lf.merge(base, adapter, home / "compiled")
    monkeypatch.setattr("loraforge.checkpoint.fused.AVAILABLE", False)
    lf.merge(base, adapter, home / "plain")
    for path in sorted((home / "plain").iterdir()):
        assert path.read_bytes() == (home / "compiled" / path.name).read_bytes(), path.name


def test_of_an_adapter_that_went_in_twice_one_can_be_taken_out(home):
    tensors = a_base()
    base = write_base(home / "base", tensors)
    lf.save(adapter_for(tensors), home / "adapter")
    lf.merge(base, [home / "adapter", home / "adapter"], home / "twice")
    lf.merge(base, home / "adapter", home / "once")
    lf.unmerge(home / "twice", home / "left", only=str(home / "adapter"), adapters=[home / "adapter"])
    once, left = (sorted((home / name).glob("*.safetensors")) for name in ("once", "left"))
    assert [path.read_bytes() for path in once] == [path.read_bytes() for path in left]


# --- a merge that is not what it was ----------------------------------------------------------------------------------


@pytest.fixture
def merged(home):
    tensors = a_base()
    adapter = adapter_for(tensors)
    lf.merge(write_base(home / "base", tensors), adapter, home / "merged")
    return tensors, adapter


def change(directory, name, where=(0, 0)):
    """Flip the last bit of one element."""
    with open_checkpoint(directory) as checkpoint:
        tensor = checkpoint.tensors[name]
        columns = tensor.entry.shape[-1]
        place = tensor.begin + (where[0] * columns + where[1]) * tensor.itemsize
    path = directory / tensor.shard
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", [Q, V, "model.embed.weight"])
def test_a_bit_that_changed_after_the_merge(name, merged, home):
    _, adapter = merged
    change(home / "merged", name, (5, 3))
    before = snapshot(home)
    with pytest.raises(ConflictError, match=f"{name}.*nothing was written"):
        lf.unmerge(home / "merged", home / "back", adapters=[adapter])
    with pytest.raises(ConflictError, match=f"{name}.*nothing was written"):
        lf.unmerge_in_place(home / "merged", adapters=[adapter])
    report = lf.verify_merge(home / "merged", adapters=[adapter])
    assert not report.holds
    assert [found.tensor for found in report.differences] == [name]
    assert "something has changed it since" in report.differences[0].why
    assert snapshot(home) == before


def test_verify_goes_as_deep_as_it_can(merged, home):
    _, adapter = merged
    assert (lf.verify_merge(home / "merged").depth, lf.verify_merge(home / "merged").holds) == ("receipt", True)
    report = lf.verify_merge(home / "merged", adapters=[adapter])
    assert (report.depth, report.holds, report.tensors) == ("adapters", True, 5)
    report = lf.verify_merge(home / "merged", adapters=[adapter], base=home / "base")
    assert (report.depth, report.holds) == ("base", True)
    with pytest.raises(NotFoundError, match=r"adapter 1 .* is not in the store"):
        lf.verify_merge(home / "merged", base=home / "base")
    registry = lf.Registry()
    registry.push(adapter)
    assert lf.verify_merge(home / "merged", registry=registry).depth == "adapters"


@pytest.mark.parametrize("name", [Q, "model.embed.weight"])
def test_verify_finds_a_base_that_is_another(name, merged, home):
    _, adapter = merged
    change(home / "base", name, (1, 1))
    report = lf.verify_merge(home / "merged", adapters=[adapter], base=home / "base")
    assert [(d.tensor, d.why) for d in report.differences] == [(name, "is another one in this base")]
    write_base(home / "base", {"other.weight": torch.ones(2)})
    report = lf.verify_merge(home / "merged", adapters=[adapter], base=home / "base")
    assert len(report.differences) == 6
    assert {d.why for d in report.differences} == {"is missing in the base", "is not of this merge in the base"}


def test_a_receipt_of_another_merge(merged, home):
    other = adapter_for(merged[0], seed=5)
    lf.merge(home / "base", other, home / "other")
    before = snapshot(home)
    with pytest.raises(ConflictError, match="not the one that the merge left"):
        lf.unmerge(home / "merged", home / "back", adapters=[other], receipt=home / "other" / "loraforge.receipt")
    assert snapshot(home) == before
    with pytest.raises(NotFoundError, match="not in the store"):
        lf.unmerge(home / "merged", home / "back", adapters=[other])
    assert snapshot(home) == before


def test_damage_to_the_receipt(merged, home):
    _, adapter = merged
    path = home / "merged" / "loraforge.receipt"
    path.write_bytes(path.read_bytes()[:-1])
    before = snapshot(home)
    for call in (lf.unmerge_in_place, lf.verify_merge):
        with pytest.raises(FormatError, match="not a receipt"):
            call(home / "merged", adapters=[adapter])
    with pytest.raises(FormatError, match="not a receipt"):
        lf.unmerge(home / "merged", home / "back", adapters=[adapter])
    assert snapshot(home) == before


def test_a_base_that_changes_while_it_is_merged(home):
    tensors = a_base()
    base, adapter = write_base(home / "base", tensors), adapter_for(tensors)
    before = snapshot(home)

    def touch(_):
        os.utime(base / "model.safetensors", ns=(1, 1))

    with pytest.raises(ConflictError, match="changed while it was read"):
        lf.merge(base, adapter, home / "merged", progress=touch)
    assert snapshot(home) == before


def test_a_disk_that_fails(home, monkeypatch):
    tensors = a_base()
    base, adapter = write_base(home / "base", tensors), adapter_for(tensors)
    before = snapshot(home)

    def full(*_):
        raise OSError(28, "No space left on device")

    for call in ("pwrite", "fsync", "posix_fallocate", "mkdir"):
        with monkeypatch.context() as patch:
            patch.setattr(output.os, call, full)
            with pytest.raises(InputOutputError, match="No space left"):
                lf.merge(base, adapter, home / "merged")
        assert snapshot(home) == before, call


# --- in place ---------------------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("compute", ["exact", "float32"])
def test_in_place_and_back(dtype, compute, home):
    tensors = a_base(dtype)
    base = write_base(home / "base", tensors)
    adapters = [(adapter_for(tensors, 0.01, seed=seed), 1.0 - seed) for seed in range(3)]
    before = snapshot(home)
    lf.merge(base, adapters, home / "merged", compute=compute)
    expected = snapshot(home / "merged")
    result = lf.merge_in_place(base, adapters, compute=compute)
    assert snapshot(base) == expected
    assert result.receipt_size == (base / "loraforge.receipt").stat().st_size
    assert lf.verify_merge(base, adapters=[a for a, _ in adapters]).holds
    lf.unmerge_in_place(base, adapters=[a for a, _ in adapters])
    assert {path: what for path, what in snapshot(home).items() if not path.startswith("merged")} == before


def test_in_place_of_every_kind_of_change_in_shards(home):
    tensors, adapter = every_kind_of_change()
    names = list(tensors)
    base = write_shards(home / "base", [{n: tensors[n] for n in part} for part in (names[:2], names[2:5], names[5:])])
    before = snapshot(base)
    lf.merge(base, adapter, home / "merged")
    lf.merge_in_place(base, adapter)
    assert snapshot(base) == snapshot(home / "merged")
    lf.unmerge_in_place(base, adapters=[adapter])
    assert snapshot(base) == before


def test_in_place_refuses_files_that_are_not_its_own(home):
    tensors = a_base()
    parts = [{n: t for n, t in tensors.items() if (n == "model.embed.weight") == first} for first in (True, False)]
    base, adapter = write_shards(home / "base", parts), adapter_for(tensors)
    untouched, touched = sorted(base.glob("model-*.safetensors"))
    (home / "hard").hardlink_to(touched)
    refused = snapshot(home)
    with pytest.raises(ConflictError, match="hard link"):
        lf.merge_in_place(base, adapter)
    assert snapshot(home) == refused
    (home / "hard").unlink()
    touched.rename(home / "elsewhere")
    touched.symlink_to(home / "elsewhere")
    refused = snapshot(home)
    with pytest.raises(ConflictError, match="link"):
        lf.merge_in_place(base, adapter)
    assert snapshot(home) == refused
    touched.unlink()
    (home / "elsewhere").rename(touched)
    # a file that is not written to may be shared
    untouched.rename(home / "shared")
    untouched.symlink_to(home / "shared")
    lf.merge_in_place(base, adapter)
    lf.unmerge_in_place(base, adapters=[adapter])
    assert untouched.is_symlink()
    assert_same(read_tensors(base), tensors)


def test_in_place_twice(home):
    tensors = a_base()
    base, adapter = write_base(home / "base", tensors), adapter_for(tensors)
    lf.merge_in_place(base, adapter)
    before = snapshot(home)
    for again in (adapter, adapter_for(tensors, seed=3)):
        with pytest.raises(ConflictError, match="adapter 1 merged in already"):
            lf.merge_in_place(base, again)
    with pytest.raises(NotFoundError, match="not in the store"):
        lf.unmerge_in_place(base)
    assert snapshot(home) == before
    with pytest.raises(NotFoundError, match="no such directory"):
        lf.merge_in_place(base / "model.safetensors", adapter)


def test_in_place_with_another_arithmetic_than_it_began_with(home, monkeypatch):
    """What is finished is what was begun, and is not said to be what was asked for."""
    tensors = a_base()
    base, adapter = write_base(home / "base", tensors), adapter_for(tensors)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(journal, "sync_aside", interrupted)
        with pytest.raises(KeyboardInterrupt):
            lf.merge_in_place(base, adapter)
    with pytest.raises(ConflictError, match="adapter 1 merged in already"):
        lf.merge_in_place(base, adapter, compute="float32")
    assert receipt_of(base).receipt.compute == "exact"
    assert lf.verify_merge(base, adapters=[adapter]).holds


def test_weights_as_a_mapping_are_refused(home):
    tensors = a_base()
    base, adapter = write_base(home / "base", tensors), saved(adapter_for(tensors), home / "adapter")
    refuses(home, CompositionError, "as a mapping; expected a list", base, {adapter: 0.5})


@pytest.mark.parametrize("kept", [torch.float16, torch.bfloat16, torch.float64])
def test_rows_of_the_base_saved_in_another_type_than_its_file_has(kept, home):
    """A model is often trained in a shorter type than its file's, and PEFT saves an embedding's rows along."""
    tensors = {"embed_tokens.weight": normal(30, 24, std=1.0)}
    pair = LowRank("embedding", normal(2, 30, seed=1), normal(24, 2, seed=2), 2.0)
    base = write_base(home / "base", tensors, {"tie_word_embeddings": False})

    def along(rows):
        settings = Settings(target_modules=("embed_tokens",))
        return Adapter({"embed_tokens": pair}, settings, {"embed_tokens.base_layer.weight": rows})

    lf.merge(base, along(tensors["embed_tokens.weight"].to(kept)), home / "merged")
    lf.merge(base, Adapter({"embed_tokens": pair}), home / "expected")
    assert weights(home / "merged") == weights(home / "expected")
    other = tensors["embed_tokens.weight"].to(kept) * 1.01
    refuses(home, CompositionError, "trained on another base", base, along(other))


def test_saved_integers_that_the_base_cannot_hold(home):
    tensors = a_base() | {"model.steps": torch.tensor([7], dtype=torch.uint8)}
    base, settings = write_base(home / "base", tensors), Settings(modules_to_save=("model",))
    pairs = adapter_for(tensors).targets
    for number in (256, -1):
        counted = Adapter(pairs, settings, {"model.steps": torch.tensor([number])})
        refuses(home, CompositionError, "'model.steps', U8, cannot hold", base, counted)
    lf.merge(base, Adapter(pairs, settings, {"model.steps": torch.tensor([255])}), home / "merged")
    assert read_tensors(home / "merged")["model.steps"].tolist() == [255]


def test_the_current_directory_is_refused_before_anything_is_done(home, monkeypatch):
    """Nothing can take its place by a rename, as empty as it may be."""
    tensors = a_base()
    base, adapter = write_base(home / "base", tensors), adapter_for(tensors)
    (home / "empty").mkdir()
    monkeypatch.chdir(home / "empty")
    with pytest.raises(ConflictError, match="no name"):
        lf.merge(base, adapter, ".")
    assert list((home / "empty").iterdir()) == []


def test_not_a_number_in_a_saved_tensor(home):
    tensors = a_base()
    base, settings = write_base(home / "base", tensors), Settings(modules_to_save=("embed",))
    embedding = torch.full((30, 24), float("nan"))
    adapter = Adapter(adapter_for(tensors).targets, settings, {"model.embed.weight": embedding})
    refuses(home, NumericalError, "'model.embed.weight' at .0, 0.: .* would become nan", base, adapter)


# --- what it costs ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Four million elements, and an update of half a percent of their norm."""
    home = tmp_path_factory.mktemp("large")
    tensors = {"q.weight": normal(2048, 2048, seed=1, dtype=torch.bfloat16), "other": normal(500, 500, seed=2)}
    return write_base(home / "base", tensors), adapter_for(tensors, 0.005, rank=16, targets=["q"])


def test_the_receipt_is_a_hundredth_of_what_is_touched(large, tmp_path):
    base, adapter = large
    result = lf.merge(base, adapter, tmp_path / "merged")
    assert result.touched_bytes == 2 * 2048**2
    assert result.receipt_size == (tmp_path / "merged" / "loraforge.receipt").stat().st_size
    assert result.receipt_size <= 0.01 * result.touched_bytes


def test_in_place_writes_little_more_than_what_changes(large, tmp_path, monkeypatch):
    source, adapter = large
    base = shutil.copytree(source, tmp_path / "base")
    written, pwrite = [], os.pwrite

    def counting(fd, data, position):
        written.append(pwrite(fd, data, position))
        return written[-1]

    monkeypatch.setattr(output.os, "pwrite", counting)
    monkeypatch.setattr(output.os, "copy_file_range", None)  # copies nothing, so is not called
    result = lf.merge_in_place(base, adapter)
    assert result.touched_bytes <= sum(written) <= 1.1 * result.touched_bytes
    written.clear()
    lf.unmerge_in_place(base, adapters=[adapter])
    assert sum(written) <= 1.1 * result.touched_bytes
    assert weights(base) == weights(source)


def test_the_receipt_says_what_is_lost(large, tmp_path):
    """The fidelity it keeps is that of a float64 computation, on a sample."""
    base, adapter = large
    result = lf.merge(base, adapter, tmp_path / "merged")
    before, after = (read_tensors(d)["q.weight"].double() for d in (base, tmp_path / "merged"))
    delta = adapter.targets["q"].delta()
    exact = float(((after - before) - delta).norm() / delta.norm())
    assert result.fidelity.error == pytest.approx(exact, rel=0.05)
    assert result.fidelity.share_changed == pytest.approx(float((after != before).double().mean()), rel=0.05)
    assert receipt_of(tmp_path / "merged").receipt.fidelity == result.fidelity


def test_json_of_the_index_is_not_touched(home):
    """Shards keep their names and the index its bytes, odd spelling and all."""
    tensors = a_base()
    names = list(tensors)
    base = write_shards(home / "base", [{n: tensors[n] for n in part} for part in (names[:1], names[1:])])
    index = base / "model.safetensors.index.json"
    index.write_text(json.dumps(json.loads(index.read_text()), indent=7) + "\n\n")
    lf.merge(base, adapter_for(tensors), home / "merged")
    assert (home / "merged" / index.name).read_bytes() == index.read_bytes()


@pytest.mark.parametrize("where", ["rows", "columns", "saved"])
def test_tensors_without_elements(where, home):
    """Either merged as they are, or refused by name."""
    tensors = {"q.weight": torch.zeros(0, 4), "w.weight": torch.zeros(3, 0), "head.weight": torch.zeros(0, 4)}
    base = write_base(home / "base", tensors)
    given = {
        "rows": Adapter({"q": LowRank("linear", torch.ones(2, 4), torch.ones(0, 2), 1.0)}),
        "columns": Adapter({"w": LowRank("linear", torch.ones(2, 0), torch.ones(3, 2), 1.0)}),
        "saved": Adapter({}, extras={"head.weight": torch.zeros(0, 4)}),
    }[where]
    try:
        lf.merge(base, given, home / "merged")
    except lf.LoraforgeError:
        return
    lf.unmerge(home / "merged", home / "back", adapters=[given])
    assert weights(home / "back") == weights(base)
