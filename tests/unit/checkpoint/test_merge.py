"""Merge and unmerge of small checkpoints: bits, receipts, refusals."""

import errno
import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import loraforge as lf
from loraforge.adapter import LowRank
from loraforge.checkpoint import output
from loraforge.checkpoint.staging import Staging
from loraforge.errors import CompositionError, ConflictError, InputOutputError, NotFoundError, NumericalError

Q, K = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
RATIOS = [1e-4, 1e-3, 5e-3, 0.1, 1.0]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def tensors(dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    found = {f"{Q}.weight": torch.randn(120, 200, generator=g), f"{K}.weight": torch.randn(24, 200, generator=g)}
    q = found[f"{Q}.weight"].mul_(0.02)
    found[f"{K}.weight"].mul_(0.02)
    q[0], q[1], q[2], q[3] = 0, -0.0, q[2] * 1e-6, 2.0**-6
    found |= {"model.norm.weight": torch.ones(7), "lm_head.weight": torch.randn(5, 200, generator=g)}
    found = {name: tensor.to(dtype) for name, tensor in found.items()}
    found[f"{Q}.weight"][4] = torch.finfo(dtype).smallest_normal / 4  # subnormal
    return found


def adapter(ratio, seed=1, rank=4, **more):
    g = torch.Generator().manual_seed(seed)
    size = 0.02 * ratio / rank**0.5
    pairs = {
        name: LowRank("linear", torch.randn(rank, 200, generator=g), torch.randn(m, rank, generator=g) * size, rank)
        for name, m in ((Q, 120), (K, 24))
    }
    return lf.Adapter(pairs, **more)


@pytest.fixture
def base(tmp_path):
    def make(dtype=torch.bfloat16, **changes):
        folder = tmp_path / "base"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        save_file(tensors(dtype) | changes, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps({"tie_word_embeddings": False}))
        return folder

    return make


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("count", [1, 5])
def test_unmerge_gives_every_byte_back(base, tmp_path, dtype, ratio, count):
    folder = base(dtype)
    adapters = [(adapter(ratio, seed), 1 - 0.4 * seed) for seed in range(count)]
    lf.merge(folder, adapters, tmp_path / "merged")
    assert weights(tmp_path / "merged") != weights(folder)
    result = lf.unmerge(tmp_path / "merged", tmp_path / "back", adapters=[a for a, _ in adapters])
    assert weights(tmp_path / "back") == weights(folder)
    assert result.base == result.merged
    assert not (tmp_path / "back" / "loraforge.receipt").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_sum_is_the_float64_reference_rounded_once(base, tmp_path, dtype):
    adapters = [(adapter(0.01, 1), 0.5), (adapter(0.01, 2), -1.5)]
    lf.merge(base(dtype), adapters, tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for name in (Q, K):
        w = tensors(dtype)[f"{name}.weight"].double()
        reference = (w + sum(weight * a.targets[name].delta() for a, weight in adapters)).numpy()
        # numpy rounds float64 to float16 and float32 at once; torch goes through float32
        assert (
            merged[f"{name}.weight"].numpy().tolist()
            == reference.astype(merged[f"{name}.weight"].numpy().dtype).tolist()
        )


def test_another_process_another_thread_count_and_another_writer(base, tmp_path):
    folder, one = base(), adapter(0.005)
    lf.save(one, tmp_path / "adapter")
    lf.merge(folder, tmp_path / "adapter", tmp_path / "merged")
    again = tmp_path / "again"
    again.mkdir()
    found = load_file(tmp_path / "merged" / "model.safetensors")
    save_file(dict(reversed(found.items())), again / "other.safetensors", metadata={"a": "b"})
    script = (
        "import sys, torch, loraforge as lf; torch.set_num_threads(1);"
        "lf.unmerge(sys.argv[1], sys.argv[2], adapters=[sys.argv[3]], receipt=sys.argv[4])"
    )
    receipt = tmp_path / "merged" / "loraforge.receipt"
    arguments = [again, tmp_path / "back", tmp_path / "adapter", receipt]
    subprocess.run([sys.executable, "-c", script, *map(str, arguments)], check=True)
    back = load_file(tmp_path / "back" / "other.safetensors")
    assert all(torch.equal(back[n], t) for n, t in tensors(torch.bfloat16).items())


def test_only_takes_one_out_and_leaves_the_merge_of_the_rest(base, tmp_path):
    folder, store = base(), lf.Registry()
    for number in range(3):
        store.push(adapter(0.01, number), f"a{number}:v1")
    lf.merge(folder, [("a0:v1", 1.0), ("a1:v1", 0.5), ("a2:v1", -1.0)], tmp_path / "all")
    lf.unmerge(tmp_path / "all", tmp_path / "two", only="a1:v1")
    lf.merge(folder, [("a0:v1", 1.0), ("a2:v1", -1.0)], tmp_path / "expected")
    for name in ("model.safetensors", "loraforge.receipt"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()


def test_in_place_and_back(base, tmp_path, monkeypatch):
    folder, one = base(), adapter(0.01)
    before = weights(folder)
    lf.merge(folder, one, tmp_path / "merged")
    written = []
    pwrite = output.os.pwrite
    monkeypatch.setattr(output.os, "pwrite", lambda fd, data, at: written.append(len(data)) or pwrite(fd, data, at))
    result = lf.merge_in_place(folder, one)
    assert sum(written) < 1.1 * result.touched_bytes + 8192  # the journal and the receipt have headers
    assert weights(folder) == weights(tmp_path / "merged")
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "loraforge.receipt", "model.safetensors"]
    with pytest.raises(ConflictError, match="merged in already"):
        lf.merge_in_place(folder, one)
    lf.unmerge_in_place(folder, adapters=[one])
    assert weights(folder) == before
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_in_place_refuses_what_others_share(base, tmp_path):
    folder, one = base(), adapter(0.01)
    before = weights(folder)
    (tmp_path / "other").hardlink_to(folder / "model.safetensors")
    with pytest.raises(ConflictError, match="hard links"):
        lf.merge_in_place(folder, one)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(tmp_path / "other")
    with pytest.raises(ConflictError, match="is a link"):
        lf.merge_in_place(folder, one)
    assert weights(folder) == before


def test_the_receipt_is_small(tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    g = torch.Generator().manual_seed(0)
    save_file({"q.weight": (torch.randn(2048, 2048, generator=g) * 0.02).bfloat16()}, folder / "model.safetensors")
    b = torch.randn(2048, 16, generator=g) * 0.02 * 0.005 / 4
    pair = LowRank("linear", torch.randn(16, 2048, generator=g), b, 16)
    result = lf.merge(folder, lf.Adapter({"q": pair}), tmp_path / "merged")
    assert result.receipt_size <= 0.01 * result.touched_bytes
    assert 0.2 < result.fidelity.error < 0.5  # what bfloat16 takes from an update of this size


def test_nothing_to_add_changes_nothing(base, tmp_path):
    folder, one = base(), adapter(0.01)
    lf.merge(folder, [(one, 0.0)], tmp_path / "merged")
    assert weights(tmp_path / "merged") == weights(folder)


def test_verify_says_which_tensor(base, tmp_path):
    folder, one = base(), adapter(0.01)
    lf.merge(folder, one, tmp_path / "merged")
    assert lf.verify_merge(tmp_path / "merged", adapters=[one]).holds
    assert lf.verify_merge(tmp_path / "merged", adapters=[one], base=folder).depth == "base"
    assert lf.verify_merge(tmp_path / "merged").depth == "receipt"
    found = load_file(tmp_path / "merged" / "model.safetensors")
    found[f"{Q}.weight"][5, 5] += 1
    save_file(found, tmp_path / "merged" / "model.safetensors")
    report = lf.verify_merge(tmp_path / "merged")
    assert [d.tensor for d in report.differences] == [f"{Q}.weight"]
    with pytest.raises(ConflictError, match="q_proj"):
        lf.unmerge(tmp_path / "merged", tmp_path / "back", adapters=[one])
    assert not (tmp_path / "back").exists()
    assert not list(tmp_path.glob(".*"))


def test_refusals_leave_nothing(base, tmp_path):
    folder, one = base(), adapter(0.01)
    nan = adapter(0.01)
    nan.targets[Q].a[0, 0] = float("nan")
    wrong = lf.Adapter({"model.layers.9.q": one.targets[Q]})
    long = lf.Adapter({"lm_head": LowRank("linear", torch.ones(1, 9), torch.ones(5, 1), 1)})
    cases = [(nan, NumericalError, "nan"), (wrong, CompositionError, "no tensor"), (long, CompositionError, "shape")]
    for bad, kind, match in cases:
        with pytest.raises(kind, match=match):
            lf.merge(folder, bad, tmp_path / "merged")
    with pytest.raises(NumericalError, match="the base holds"):
        lf.merge(base(**{f"{Q}.weight": torch.full((120, 200), float("inf"))}), one, tmp_path / "merged")
    with pytest.raises(NumericalError, match="beyond what F16"):
        lf.merge(base(torch.float16), adapter(1e8), tmp_path / "merged")
    with pytest.raises(CompositionError, match="quantised"):
        lf.merge(base(**{f"{Q}.weight": torch.ones(120, 200, dtype=torch.int8)}), one, tmp_path / "merged")
    with pytest.raises(ConflictError, match="inside the input"):
        lf.merge(base(), one, folder / "merged")
    with pytest.raises(NotFoundError, match="receipt"):
        lf.unmerge(base(), tmp_path / "merged")
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "default-store") == ["base"]


def test_the_rest_of_the_directory_comes_along(base, tmp_path):
    folder = base()
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"old weights")
    (folder / "pytorch_model.bin.index.json").write_text("{}")
    for name in ("1_Pooling/config.json", "original/consolidated.00.pth", "original/params.json", ".cache/etag"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    result = lf.merge(folder, adapter(0.01), tmp_path / "merged")
    came = {str(p.relative_to(tmp_path / "merged")) for p in (tmp_path / "merged").rglob("*") if p.is_file()}
    assert came == {"config.json", "tokenizer.json", "1_Pooling/config.json", "model.safetensors", "loraforge.receipt"}
    assert result.left_out == (
        "original/consolidated.00.pth",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    )


def test_an_error_leaves_no_directory_of_those_that_came_along(base, tmp_path, monkeypatch):
    folder = base()
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")

    def full(*_):
        raise InputOutputError(errno.ENOSPC, "no space")

    monkeypatch.setattr(Staging, "_write_receipt", full)  # the last that is written
    with pytest.raises(InputOutputError):
        lf.merge(folder, adapter(0.01), tmp_path / "merged")
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "default-store") == ["base"]


def test_no_file_of_the_base_can_take_the_place_of_a_shard_in_the_making(base, tmp_path):
    folder = base()
    strays = ["model.safetensors.part", "undo.part", "progress"]
    for name in strays:
        (folder / name).write_text("of a download that was cut off")
    lf.merge(folder, adapter(0.01), tmp_path / "merged")
    for name in strays:
        (folder / name).unlink()
    lf.merge(folder, adapter(0.01), tmp_path / "clean")
    assert weights(tmp_path / "merged") == weights(tmp_path / "clean")
    assert all((tmp_path / "merged" / name).exists() for name in strays)
    assert lf.verify_merge(tmp_path / "merged", adapters=[adapter(0.01)]).holds


def test_what_a_killed_run_left_for_a_longer_name_is_not_swept(base, tmp_path):
    others, ours = tmp_path / ".merged.v2.0123456789ab.loraforge", tmp_path / ".merged.0123456789ab.loraforge"
    others.mkdir()
    ours.mkdir()
    lf.merge(base(), adapter(0.01), tmp_path / "merged")
    assert others.exists()
    assert not ours.exists()


def test_an_output_inside_an_adapter_is_refused(base, tmp_path):
    lf.save(adapter(0.01), tmp_path / "french")
    with pytest.raises(ConflictError, match="inside the input"):
        lf.merge(base(), tmp_path / "french", tmp_path / "french" / "merged")
    lf.merge(base(), [(tmp_path / "french", 1.0)], tmp_path / "merged")
    with pytest.raises(ConflictError, match="inside the input"):
        lf.unmerge(tmp_path / "merged", tmp_path / "french" / "again", adapters=[tmp_path / "french"])
    assert not [path for path in (tmp_path / "french").iterdir() if path.is_dir()]
