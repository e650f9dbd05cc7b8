"""What vLLM does not take (read in its 0.33 ``lora/peft_helper.py``), said at a push."""

from collections.abc import Iterator

from loraforge_registry.config import AdapterConfig
from loraforge_registry.layout import Layout

_HEADS = ("classifier", "score")
_DEFAULT_RANK = 16
_MAX_RANK = 512


def refused_by_vllm(config: AdapterConfig, layout: Layout) -> Iterator[str]:
    """Yield what of an adapter vLLM refuses, or would get wrong."""
    settings, scaling = config.settings, config.scaling
    if scaling.dora:
        yield "use_dora"
    if settings.bias != "none":
        yield f"bias {settings.bias!r}"
    if scaling.lora_bias:
        yield "lora_bias"
    others = sorted(set(settings.modules_to_save) - set(_HEADS))
    if others:
        yield f"modules_to_save {', '.join(others[:4])}"
    if settings.token_indices:
        yield "trainable_token_indices"
    if settings.base_mutating_init:
        yield f"init_lora_weights {settings.base_mutating_init!r}"
    rank = max(target.rank for target in layout.targets.values())
    if rank > _MAX_RANK:
        yield f"rank {rank}, above its limit of {_MAX_RANK}"


def vllm_flags(layout: Layout) -> str | None:
    """Return the option without which vLLM refuses the adapter's rank."""
    rank = max(target.rank for target in layout.targets.values())
    fits = next((limit for limit in (32, 64, 128, 256, 320, 512) if rank <= limit), None)
    return f"--max-lora-rank {fits}" if rank > _DEFAULT_RANK and fits else None
