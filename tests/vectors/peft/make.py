"""Write golden LoRA adapters with the PEFT version that is installed.

``PYTHONHASHSEED=0 python make.py OUT`` writes, for each case below,
``OUT/<peft version>/<case>/adapter_config.json`` and ``adapter_model.safetensors``. A case that this
PEFT does not support is skipped, with a line that says so. ``--truth`` adds what PEFT makes of the
adapter:

- ``expected.safetensors``: for each adapted module, ``get_delta_weight("default")`` as float32, by
  the module's path in the base model. With DoRA this is the delta before the magnitudes.
- ``base.safetensors`` and ``merged.safetensors`` (cases with ``merged=True``): the state dict of
  the base model before the adapter came, and after ``merge_and_unload()``.

Every value is k/32 with an integer k in 1..31 and a random sign (magnitudes are positive),
drawn from a generator seeded by the parameter's name, so that the values are non-zero, the same under
every version, exact in bfloat16, and their products and small sums exact in float32.
The goldens beside this file keep the truth under the newest PEFT, and under an older one only where it
differs or the newest has none; README.md files are dropped.
The hash seed only pins the order in which PEFT writes sets such as ``target_modules``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before the imports below read it

import peft
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

PREFIX = "base_model.model."


@dataclass(frozen=True)
class Case:
    build: Callable[[], nn.Module]
    lora: dict[str, Any]
    merged: bool = False
    dtype: torch.dtype = torch.float32
    base_name: str | None = None


class Experts(nn.Module):
    """Weights without a module of their own, as in a mixture of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.zeros(3, 6, 8))
        self.flat = nn.Parameter(torch.zeros(10, 6))


def modules(**children: nn.Module) -> Callable[[], nn.Module]:
    """A model that is nothing but its named children."""
    return lambda: nn.ModuleDict(children)


def blocks(count: int) -> nn.Module:
    """A model with ``model.layers.<i>.q`` and ``model.layers.<i>.v``."""
    layers = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(6, 8), "v": nn.Linear(6, 10)}) for _ in range(count))
    return nn.ModuleDict({"model": nn.ModuleDict({"layers": layers})})


def nested() -> nn.Module:
    """A model in which the path ``proj`` is a suffix of ``block.proj`` and ``deep.block.proj``."""
    block = nn.ModuleDict({"proj": nn.Linear(6, 8)})
    deep = nn.ModuleDict({"block": nn.ModuleDict({"proj": nn.Linear(6, 8)})})
    return nn.ModuleDict({"proj": nn.Linear(6, 8), "block": block, "deep": deep, "out": nn.Linear(8, 6)})


def llama(cls: type[nn.Module] = LlamaForCausalLM, **kwargs: Any) -> Callable[[], nn.Module]:
    settings: dict[str, Any] = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "pad_token_id": 0,
    }
    return lambda: cls(LlamaConfig(**{**settings, **kwargs}))


def two_linears() -> nn.Module:
    return nn.ModuleDict({"fc": nn.Linear(6, 8), "head": nn.Linear(8, 10)})


def linear_and_embedding() -> nn.Module:
    return nn.ModuleDict({"emb": nn.Embedding(10, 6), "fc": nn.Linear(6, 8)})


CASES: dict[str, Case] = {
    "linear": Case(two_linears, {"r": 2, "lora_alpha": 2, "target_modules": ["fc", "head"]}),
    "linear_alpha": Case(two_linears, {"r": 4, "lora_alpha": 6, "target_modules": ["fc"]}),
    "rslora": Case(two_linears, {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": ["fc", "head"]}),
    "patterns": Case(
        nested,
        {
            "r": 2,
            "lora_alpha": 3,
            "target_modules": ["proj", "out"],
            "rank_pattern": {"block.proj": 4, "out": 1},
            "alpha_pattern": {"deep.block.proj": 8, "out": 5},
        },
    ),
    "conv1d_gpt2": Case(
        modules(c_attn=Conv1D(10, 6)),
        {"r": 2, "lora_alpha": 4, "fan_in_fan_out": True, "target_modules": ["c_attn"]},
    ),
    "embedding": Case(modules(emb=nn.Embedding(10, 6)), {"r": 2, "lora_alpha": 4, "target_modules": ["emb"]}),
    "conv1d": Case(modules(conv=nn.Conv1d(6, 8, 3)), {"r": 2, "lora_alpha": 4, "target_modules": ["conv"]}),
    "conv2d": Case(
        modules(conv=nn.Conv2d(6, 8, (3, 2)), point=nn.Conv2d(8, 6, 1)),
        {"r": 2, "lora_alpha": 4, "target_modules": ["conv", "point"]},
    ),
    "conv2d_grouped": Case(
        modules(conv=nn.Conv2d(6, 8, 3, groups=2)), {"r": 2, "lora_alpha": 4, "target_modules": ["conv"]}
    ),
    "conv3d": Case(modules(conv=nn.Conv3d(4, 6, (1, 2, 3))), {"r": 2, "lora_alpha": 4, "target_modules": ["conv"]}),
    "mha": Case(modules(attn=nn.MultiheadAttention(6, 2)), {"r": 2, "lora_alpha": 4, "target_modules": ["attn"]}),
    "lora_bias": Case(two_linears, {"r": 2, "lora_alpha": 4, "lora_bias": True, "target_modules": ["fc"]}, merged=True),
    "bias_all": Case(two_linears, {"r": 2, "lora_alpha": 4, "bias": "all", "target_modules": ["fc"]}, merged=True),
    "bias_lora_only": Case(
        two_linears, {"r": 2, "lora_alpha": 4, "bias": "lora_only", "target_modules": ["fc"]}, merged=True
    ),
    "modules_to_save": Case(
        two_linears,
        {"r": 2, "lora_alpha": 4, "target_modules": ["fc"], "modules_to_save": ["head"]},
        merged=True,
    ),
    "trainable_tokens": Case(
        linear_and_embedding,
        {"r": 2, "lora_alpha": 4, "target_modules": ["fc"], "trainable_token_indices": {"emb": [1, 7]}},
        merged=True,
    ),
    "trainable_tokens_tied": Case(
        llama(tie_word_embeddings=True),
        {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "trainable_token_indices": [3, 30]},
        base_name="example/tiny-llama",
    ),
    "dora_linear": Case(
        two_linears, {"r": 2, "lora_alpha": 4, "use_dora": True, "target_modules": ["fc"]}, merged=True
    ),
    "dora_conv2d": Case(
        modules(conv=nn.Conv2d(6, 8, 2)),
        {"r": 2, "lora_alpha": 4, "use_dora": True, "target_modules": ["conv"]},
        merged=True,
    ),
    "dora_embedding": Case(
        modules(emb=nn.Embedding(10, 6)),
        {"r": 2, "lora_alpha": 4, "use_dora": True, "target_modules": ["emb"]},
        merged=True,
    ),
    "layers_to_transform": Case(
        lambda: blocks(3),
        {
            "r": 2,
            "lora_alpha": 4,
            "target_modules": ["q", "v"],
            "layers_to_transform": [0, 2],
            "layers_pattern": "layers",
        },
    ),
    "regex": Case(lambda: blocks(2), {"r": 2, "lora_alpha": 4, "target_modules": r".*layers\.1\.(q|v)|.*layers\.0\.v"}),
    "exclude_modules": Case(
        lambda: blocks(2),
        {"r": 2, "lora_alpha": 4, "target_modules": ["q", "v"], "exclude_modules": ["layers.1.v"]},
    ),
    "target_parameters": Case(
        lambda: nn.ModuleDict({"experts": Experts(), "fc": nn.Linear(6, 8)}),
        {
            "r": 2,
            "lora_alpha": 4,
            "target_modules": ["fc"],
            "target_parameters": ["experts.up", "experts.flat"],
        },
    ),
    "bf16": Case(two_linears, {"r": 2, "lora_alpha": 4, "target_modules": ["fc", "head"]}, dtype=torch.bfloat16),
    "tiny_llama": Case(
        llama(num_hidden_layers=2),
        {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"},
        base_name="example/tiny-llama",
    ),
    "tiny_llama_all_linear": Case(
        llama(),
        {"r": 2, "lora_alpha": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"},
        base_name="example/tiny-llama",
    ),
    "seq_cls": Case(
        llama(LlamaForSequenceClassification, num_labels=3),
        {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "SEQ_CLS"},
        base_name="example/tiny-llama",
    ),
    "embed_tokens_targeted": Case(
        llama(vocab_size=20),
        {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "embed_tokens"], "task_type": "CAUSAL_LM"},
        base_name="example/tiny-llama",
    ),
}


def say(what: str, error: Exception) -> None:
    sys.stdout.write(f"PEFT {peft.__version__}: {what}: {type(error).__name__}: {error}\n")


def fill(parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Give each parameter values that depend on nothing but its name and shape."""
    for name, parameter in sorted(parameters, key=lambda item: item[0]):
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        size = torch.randint(1, 32, parameter.shape, generator=generator)
        sign = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
        value = size if "magnitude" in name else size * sign
        with torch.no_grad():
            parameter.copy_(value / 32)


def tensors(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Float32 copies that share no memory."""
    return {name: value.detach().float().contiguous().clone() for name, value in state.items()}


def deltas(model: nn.Module) -> dict[str, torch.Tensor]:
    """What ``get_delta_weight`` gives for each adapted module that defines it."""
    found: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and "default" in (*module.lora_A, *module.lora_embedding_A):
            try:
                found[name.removeprefix(PREFIX)] = module.get_delta_weight("default")
            except (NotImplementedError, RuntimeError) as error:  # such as for grouped convolutions
                say(f"no delta: {name}", error)
    return tensors(found)


def write(case: Case, folder: Path, *, truth: bool) -> None:
    base = case.build()
    fill(base.named_parameters())
    before = tensors(base.state_dict())
    if case.base_name is not None:
        base.name_or_path = case.base_name  # type: ignore[assignment]  # a property of the transformers models
    model = get_peft_model(base, LoraConfig(**case.lora), autocast_adapter_dtype=False)
    fill((name, p) for name, p in model.named_parameters() if p.requires_grad)
    model.to(case.dtype).save_pretrained(str(folder))
    (folder / "README.md").unlink(missing_ok=True)
    if truth:
        model.float()  # PEFT would round the delta of a bfloat16 adapter to bfloat16
        if found := deltas(model):
            save_file(found, folder / "expected.safetensors")
        if case.merged:
            save_file(before, folder / "base.safetensors")
            save_file(tensors(model.merge_and_unload().state_dict()), folder / "merged.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write golden LoRA adapters with the installed PEFT.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--truth", action="store_true", help="also write what PEFT makes of the adapters")
    arguments = parser.parse_args()
    for name, case in CASES.items():
        folder = arguments.out / peft.__version__ / name
        shutil.rmtree(folder, ignore_errors=True)
        try:
            write(case, folder, truth=arguments.truth)
        except (TypeError, ValueError, NotImplementedError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            say(f"skipped: {name}", error)


if __name__ == "__main__":
    main()
