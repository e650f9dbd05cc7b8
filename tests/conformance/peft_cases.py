"""Adapters written by the installed PEFT, over every kind of layer and option that the format has."""

import copy
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

VECTORS = Path(__file__).parents[1] / "vectors" / "peft"


def _goldens():
    """The script that wrote tests/vectors/peft: its cases serve here with fresh values."""
    spec = importlib.util.spec_from_file_location("peft_vectors_make", VECTORS / "make.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


make = _goldens()

UNSUPPORTED = {"mha", "target_parameters"}
"""Refused by loraforge: their factors are not those of one named module."""

CASES = {name: case for name, case in make.CASES.items() if name not in UNSUPPORTED} | {
    "rslora_patterns": make.Case(
        make.nested,
        {
            "r": 3,
            "lora_alpha": 5,
            "use_rslora": True,
            "target_modules": ["proj", "out"],
            "rank_pattern": {"deep.block.proj": 2, "out": 1},
            "alpha_pattern": {"block.proj": 7},
        },
    ),
    "conv2d_lora_bias": make.Case(
        make.modules(conv=nn.Conv2d(4, 6, 3)),
        {"r": 2, "lora_alpha": 3, "lora_bias": True, "target_modules": ["conv"]},
    ),
    "mixed_kinds": make.Case(
        make.modules(emb=nn.Embedding(12, 6), fc=nn.Linear(6, 6), conv=nn.Conv1d(6, 4, 3), fc2=nn.Linear(4, 4)),
        {"r": 3, "lora_alpha": 4, "target_modules": ["emb", "fc", "conv", "fc2"], "rank_pattern": {"fc": 5}},
    ),
    "everything_along": make.Case(
        make.modules(emb=nn.Embedding(12, 6), fc=nn.Linear(6, 6), norm=nn.LayerNorm(6), head=nn.Linear(6, 4)),
        {
            "r": 2,
            "lora_alpha": 4,
            "bias": "all",
            "target_modules": ["fc"],
            "modules_to_save": ["norm", "head"],
            "trainable_token_indices": {"emb": [0, 3, 5]},
        },
    ),
    "exact_path_bypasses_layers": make.Case(
        lambda: make.blocks(3),
        {"r": 2, "lora_alpha": 4, "target_modules": ["q", "model.layers.2.v"], "layers_to_transform": [0]},
    ),
    "tied_and_ensured": make.Case(
        make.llama(tie_word_embeddings=True),
        {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
        base_name="example/tiny-llama",
    ),
    "fp16": make.Case(make.two_linears, {"r": 2, "lora_alpha": 4, "target_modules": ["fc"]}, dtype=torch.float16),
    "fp64": make.Case(make.two_linears, {"r": 2, "lora_alpha": 4, "target_modules": ["fc"]}, dtype=torch.float64),
}


@dataclass(frozen=True)
class Written:
    """A base model, and an adapter on it as PEFT holds and has saved it."""

    base: nn.Module
    model: nn.Module
    folder: Path


def write(case, folder, seed=0):
    """Let PEFT make an adapter with random values and save it."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    base = case.build().to(case.dtype)
    kept = copy.deepcopy(base)
    if case.base_name is not None:
        base.name_or_path = case.base_name
    model = get_peft_model(base, LoraConfig(**case.lora), autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                values = torch.randn(parameter.shape, generator=generator) * 0.3
                parameter.copy_(values.abs() + 0.5 if "magnitude" in name else values)
    model.to(case.dtype).save_pretrained(str(folder))
    return Written(kept, model, folder)


def load(written, folder):
    """Load an adapter directory with PEFT, onto a fresh copy of the base."""
    from peft import PeftModel

    return PeftModel.from_pretrained(copy.deepcopy(written.base), str(folder), autocast_adapter_dtype=False)


def lora_layers(model):
    """PEFT's layers by the path of the module they adapt."""
    from peft.tuners.lora import LoraLayer

    return [(p.removeprefix("base_model.model."), m) for p, m in model.named_modules() if isinstance(m, LoraLayer)]


def deltas(model, name="default"):
    """PEFT's ``get_delta_weight`` of every layer that defines it."""
    from peft.tuners.lora import LoraLayer

    found = {}
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer) and name in (*module.lora_A, *module.lora_embedding_A):
            try:
                found[path.removeprefix("base_model.model.")] = module.get_delta_weight(name).detach()
            except (NotImplementedError, RuntimeError):  # grouped convolutions have no delta in PEFT
                continue
    return found


def state(model):
    """Every tensor that belongs to the adapter."""
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model)
