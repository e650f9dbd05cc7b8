"""What vLLM does not take (read in the ``lora/peft_helper.py`` of its 0.33), and the command that serves the rest."""

import re
from collections.abc import Iterator, Sequence

from loraforge_registry.config import AdapterConfig
from loraforge_registry.layout import Layout
from loraforge_registry.manifest import Manifest

_HEADS = ("classifier", "score")
_DEFAULT_RANK = 16
_LIMITS = (32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes, above its default
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)


def base_on_hub(manifest: Manifest) -> str | None:
    """The base's id on the Hub; a path on somebody's disk is none."""
    name = manifest.base_name
    return name if name is not None and is_on_hub(name) else None


def is_on_hub(base: str) -> bool:
    """Whether the name of a base could be an id on the Hub."""
    return _HUB_ID.fullmatch(base) is not None


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
    rank = _rank(config, layout)
    if rank > _LIMITS[-1]:
        yield f"rank {rank}, above its limit of {_LIMITS[-1]}"


def vllm_flags(config: AdapterConfig, layout: Layout) -> str | None:
    """Return the option without which vLLM refuses the adapter's rank."""
    rank = _rank(config, layout)
    fits = next((limit for limit in _LIMITS if rank <= limit), None)
    return f"--max-lora-rank {fits}" if rank > _DEFAULT_RANK and fits else None


def vllm_command(manifest: Manifest, config: AdapterConfig, layout: Layout, *, name: str, where: str) -> Sequence[str]:
    """Return the command that serves an adapter, which lies at ``where``, as ``name``: in parts, none to be broken.

    A base that has no id on a hub is ``BASE``: people paste this into a shell, and strangers name bases.
    """
    flags = vllm_flags(config, layout)
    options = ["--enable-lora", *([flags] if flags else []), f"--lora-modules {name}={where}"]
    return [f"vllm serve {base_on_hub(manifest) or 'BASE'}", *options]


def _rank(config: AdapterConfig, layout: Layout) -> int:
    """The rank that vLLM looks at: the largest that the config speaks of, even where no target has it."""
    said = (config.scaling.rank, *config.scaling.rank_pattern.values())
    return max(*said, *(target.rank for target in layout.targets.values()))
