"""merge, unmerge and verify as commands: what they say."""

import pytest
import torch
from safetensors.torch import save_file

import loraforge as lf
from loraforge.adapter import LowRank
from loraforge.checkpoint import journal

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def merged(tmp_path, run):
    """A base with french and law merged in."""
    generator = torch.Generator().manual_seed(0)
    base = tmp_path / "base"
    base.mkdir()
    save_file({f"{Q}.weight": torch.randn(32, 16, generator=generator).bfloat16()}, base / "model.safetensors")
    for name in ("french", "law"):
        pair = LowRank("linear", torch.randn(2, 16, generator=generator), torch.randn(32, 2, generator=generator), 2)
        lf.save(lf.Adapter({Q: pair}), tmp_path / name)
        assert run("push", tmp_path / name, f"{name}:v1").code == 0
    assert run("merge", base, "french:v1", "law:v1=0.5", "--out", tmp_path / "merged").code == 0
    return tmp_path / "merged"


def test_a_new_receipt_is_told_of_where_there_is_one(merged, tmp_path, run):
    some = run("unmerge", merged, "--only", "law:v1", "--out", tmp_path / "some")
    assert "with a new receipt" in some.out
    assert (tmp_path / "some" / "loraforge.receipt").exists()
    every = run("unmerge", merged, "--only", "law:v1", "--only", "french:v1", "--out", tmp_path / "every")
    assert "every digest is the base's" in every.out
    assert not (tmp_path / "every" / "loraforge.receipt").exists()


def test_a_merge_into_a_merged_checkpoint_says_what_stays_in(merged, tmp_path, run):
    again = run("merge", merged, "french:v1", "--out", tmp_path / "again")
    assert again.code == 0
    assert "french:v1, law:v1 merged in already" in again.err


def test_a_merge_in_place_that_was_cut_off_is_told_of_where_another_finishes_it(merged, tmp_path, run, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(journal, "sync_aside", interrupted)
        with pytest.raises(KeyboardInterrupt):
            lf.merge_in_place(tmp_path / "base", tmp_path / "law")
    found = run("merge", tmp_path / "base", "french:v1", "--out", tmp_path / "both")
    assert found.code == 0
    assert "law merged in already, which stays in" in found.err


def test_an_empty_path_is_not_the_current_directory(merged, tmp_path, run):
    for arguments in (("merge", "", "french:v1", "--out", tmp_path / "x"), ("merge", merged, "french:v1", "--out", "")):
        found = run(*arguments)
        assert found.code == 3
        assert "an empty path" in found.err


def test_verify_says_in_full_how_each_tensor_differs(merged, tmp_path, run):
    other = tmp_path / "other"
    other.mkdir()
    save_file({f"{Q}.weight": torch.zeros(32, 16)}, other / "model.safetensors")
    found = run("verify", merged, "--base", other)
    assert found.code == 1
    assert f"{Q}.weight is F32 [32, 16], expected BF16 [32, 16] in the base" in found.out
