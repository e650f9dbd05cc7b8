"""What the demo works on: a small Llama, yardsticks for what is done with its adapters, and PEFT's ways to combine."""

import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraforge.adapter import Adapter
from loraforge.training.data.tokens import Bytes
from loraforge_cli.demo_tasks import LENGTH, UNSEEN, prompt

PREFIX = "base_model.model."
WEIGHTS = {"french": 0.7, "law": 0.3}
RANK = 16
ALPHA = 32
_VOCABULARY = 259


@dataclass(frozen=True)
class Combined:
    """One way to combine: its rank, its error against the float64 sum of dense updates, its time in seconds."""

    name: str
    rank: str
    error: float
    seconds: float


def make_base(folder: Path) -> int:
    """Write a Llama checkpoint of random weights and return its number of parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=LENGTH,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(str(folder))
    return int(sum(parameter.numel() for parameter in model.parameters()))


def logits_gap(base: Path, adapter: Path, delta: dict[str, Tensor]) -> tuple[float, float]:
    """Return how far PEFT with ``adapter`` is from the base with the dense ``delta`` added, and the logits' size."""
    from peft import PeftModel

    tokens = torch.tensor([Bytes().encode(prompt(number)) for number in UNSEEN])
    merged = load_base(base)
    with torch.no_grad():
        for target, update in delta.items():
            merged.get_submodule(target).weight += update.to(torch.float32)
        want = merged(input_ids=tokens).logits
        got = PeftModel.from_pretrained(load_base(base), str(adapter))(input_ids=tokens).logits
    return float((got - want).abs().max()), float(want.abs().max())


def dense_sum(terms: Iterable[tuple[Adapter, float]]) -> dict[str, Tensor]:
    """The yardstick: ``sum w_i dW_i`` formed densely in float64."""
    found: dict[str, Tensor] = {}
    for adapter, weight in terms:
        for name, pair in adapter.targets.items():
            found[name] = found.get(name, torch.zeros(())) + weight * pair.delta()
    return found


def error_of(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """``|found - exact| / |exact|`` over all targets."""
    lost = sum(float((found[name] - exact[name]).square().sum()) for name in exact)
    total = sum(float(update.square().sum()) for update in exact.values())
    return float((lost / total) ** 0.5)


def adapter_error(adapter: Adapter, exact: dict[str, Tensor]) -> float:
    """``error_of`` for what an adapter computes."""
    return error_of(dense_sum([(adapter, 1.0)]), exact)


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """Run ``work`` and return its result and seconds."""
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start


def combine_in_peft(base: Path, folders: dict[str, Path], exact: dict[str, Tensor]) -> list[Combined]:
    """Combine the same adapters by PEFT's ``linear`` and ``svd``."""
    from peft import PeftModel

    names = list(folders)
    model = PeftModel.from_pretrained(load_base(base), str(folders[names[0]]), adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(str(folders[name]), name)
    weights = [WEIGHTS[name] for name in names]
    rows = []
    for kind, options in (("linear", {}), ("svd", {"svd_rank": RANK})):
        add = partial(model.add_weighted_adapter, names, weights, kind, combination_type=kind, **options)
        _, seconds = timed(add)
        rows.append(Combined(f"PEFT {kind}", str(RANK), error_of(_deltas(model, kind), exact), seconds))
    return rows


def average_with_itself_in_peft(base: Path, folder: Path) -> float:
    """Return the norm of PEFT's ``linear`` average of an adapter with itself, relative to the adapter's."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(load_base(base), str(folder), adapter_name="one")
    model.load_adapter(str(folder), "two")
    model.add_weighted_adapter(["one", "two"], [0.5, 0.5], "average", combination_type="linear")
    return _norm(_deltas(model, "average").values()) / _norm(_deltas(model, "one").values())


def be_quiet() -> None:
    """Keep the peers' remarks out of the demo, and the demo off the network."""
    import os

    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    warnings.simplefilter("ignore")


def load_base(base: Path) -> Any:  # noqa: ANN401 - transformers' models have no types here
    """Load the base."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(str(base))


def _deltas(model: Any, name: str) -> dict[str, Tensor]:  # noqa: ANN401 - PEFT's models have no types here
    layers = {path: module for path, module in model.named_modules() if name in getattr(module, "lora_A", ())}
    return {path.removeprefix(PREFIX): module.get_delta_weight(name).double() for path, module in layers.items()}


def _norm(updates: Iterable[Tensor]) -> float:
    return float(sum(float(update.square().sum()) for update in updates) ** 0.5)
