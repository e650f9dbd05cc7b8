"""Merging against PEFT: its arithmetic to the bit with float32, the float64 reference with exact."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

import loraforge as lf
from loraforge.errors import CompositionError
from tests.conformance import peft_cases

# PEFT merges what a tied weight has at both its ends into the one tensor, twice
TIED = {"tied_and_ensured", "trainable_tokens_tied"}
# what PEFT and transformers say of their own while they load and merge
pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.filterwarnings("ignore::FutureWarning")]


def write_base(model, folder, dtype):
    folder.mkdir()
    state = {
        name: t.detach().clone().to(dtype) if t.is_floating_point() else t for name, t in model.state_dict().items()
    }
    save_file({name: t.contiguous() for name, t in state.items()}, folder / "model.safetensors")


def merged_by_peft(written, dtype):
    """PEFT's unsafe merge of a base in ``dtype`` with adapters in float32, as parameters by name."""
    from peft import PeftModel

    base = copy.deepcopy(written.base).to(dtype)
    model = PeftModel.from_pretrained(base, str(written.folder))
    return model.merge_and_unload().state_dict()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", sorted(set(peft_cases.CASES) - TIED))
def test_as_peft_merges(name, dtype, tmp_path):
    case = peft_cases.CASES[name]
    written = peft_cases.write(case, tmp_path / "adapter")
    write_base(written.base, tmp_path / "base", dtype)
    dora = bool(case.lora.get("use_dora"))
    try:
        lf.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "ours", compute="exact" if dora else "float32")
    except CompositionError as refused:
        pytest.skip(f"refused: {refused}")
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    theirs = merged_by_peft(written, dtype)
    for key, tensor in ours.items():
        other = theirs[key].to(tensor.dtype)
        if dora:
            limit = 4 * torch.finfo(dtype).eps * other.abs().max()
            assert (tensor - other).abs().max() <= limit, key
        else:
            assert torch.equal(tensor, other), key
    lf.unmerge(tmp_path / "ours", tmp_path / "back", adapters=[tmp_path / "adapter"])
    back, base = (tmp_path / f / "model.safetensors" for f in ("back", "base"))
    assert back.read_bytes() == base.read_bytes()


def test_peft_does_not_come_back_and_we_do(tmp_path):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(512, 512, bias=False)).to(torch.bfloat16)
    with torch.no_grad():
        model[0].weight.mul_(0.5)
    before = model[0].weight.detach().clone()
    save_file({"0.weight": before}, tmp_path / "model.safetensors")
    peft = get_peft_model(model, LoraConfig(r=8, lora_alpha=8, target_modules=["0"]))
    layer = peft.base_model.model[0]
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_(std=1e-3)
    peft.save_pretrained(str(tmp_path / "adapter"))
    peft.merge_adapter()
    peft.unmerge_adapter()
    assert (layer.base_layer.weight != before).float().mean() > 0.005
    lf.merge(tmp_path / "model.safetensors", tmp_path / "adapter", tmp_path / "merged")
    lf.unmerge(tmp_path / "merged", tmp_path / "back", adapters=[tmp_path / "adapter"])
    assert torch.equal(load_file(tmp_path / "back" / "model.safetensors")["0.weight"], before)
