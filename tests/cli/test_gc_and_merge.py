"""What a merge was made from outlives a collection, so that it can be undone."""

import torch
from safetensors.torch import load_file, save_file

from tests.bad_files import TARGETS, write_adapter


def test_an_adapter_that_was_merged_from_a_directory_has_a_name(tmp_path, run):
    base = tmp_path / "base"
    base.mkdir()
    g = torch.Generator().manual_seed(0)
    tensors = {f"{target}.weight": torch.randn(4, 6, generator=g).bfloat16() for target in TARGETS}
    save_file(tensors, base / "model.safetensors")
    (base / "config.json").write_text("{}")
    adapter = write_adapter(tmp_path / "adapter")
    assert run("merge", base, adapter, "--out", tmp_path / "merged").code == 0
    (named,) = run("ls", "--json").json
    assert named["name"] == "merged"
    assert run("gc", "--yes", "--now").code == 0
    for path in adapter.iterdir():
        path.unlink()
    assert run("unmerge", tmp_path / "merged", "--out", tmp_path / "again").code == 0
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
