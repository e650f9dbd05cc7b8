"""Tied embeddings: one weight that a model uses at its input and at its output, and a checkpoint often stores once.

An adapter that changes only one of the two cannot be merged: the loader would make it change both. One that changes
both alike (PEFT's ensure_weight_tying) is written once.
"""

from collections.abc import Collection, Iterable
from dataclasses import replace

import torch

from loraforge.adapter import Adapter, LowRank
from loraforge.checkpoint.reader import Checkpoint
from loraforge.errors import CompositionError, FormatError
from loraforge_registry import strict_json
from loraforge_registry.ingest import read_small
from loraforge_registry.layout import SUFFIXES

INPUTS = frozenset({"embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "shared"})
OUTPUTS = frozenset({"lm_head", "embed_out", "output"})
_CONFIG = "config.json"
_MAX_CONFIG = 4 * 1024 * 1024


def written_once(base: Checkpoint, adapter: Adapter, label: str) -> Adapter:
    """Return the adapter without what it says twice about a tied weight.

    Raises:
        CompositionError: it changes one of two tied weights, or each in another way.
    """
    saved = {_module(key) for key in adapter.extras if not key.endswith(SUFFIXES["tokens"])}
    modules = {*adapter.targets, *saved}  # PEFT ties trained token rows itself, and they are meant for both
    inputs, outputs = _with_last(modules, INPUTS), _with_last(modules, OUTPUTS)
    if not (inputs or outputs) or not _are_tied(base):
        return adapter
    if not (inputs and outputs and all(_alike(adapter, one, other) for one in inputs for other in outputs)):
        raise CompositionError(
            f"{label} changes {min(inputs or outputs)!r}, which the base ties to its other embedding "
            "(tie_word_embeddings): merging would change both; untie the base first, or train with ensure_weight_tying"
        )
    gone = {module for module in outputs if not _with_last((n.removesuffix(".weight") for n in base.tensors), OUTPUTS)}
    return replace(
        adapter,
        targets={name: pair for name, pair in adapter.targets.items() if name not in gone},
        extras={key: tensor for key, tensor in adapter.extras.items() if _module(key) not in gone},
    )


def _module(key: str) -> str:
    """The module of a saved tensor; PEFT saves the base's own rows of a target under ``base_layer``."""
    return key.rpartition(".")[0].removesuffix(".base_layer")


def _are_tied(base: Checkpoint) -> bool:
    """Whether a loader will tie the embeddings; transformers does where config.json does not say."""
    if _CONFIG not in base.others:
        return False
    try:
        config = strict_json.loads(read_small(base.path / _CONFIG, _MAX_CONFIG), max_bytes=_MAX_CONFIG, max_depth=64)
    except FormatError as error:
        raise FormatError(f"{base.path / _CONFIG}: {error}") from error
    if not isinstance(config, dict):
        return False
    nested = config.get("text_config")
    said = config.get("tie_word_embeddings", nested.get("tie_word_embeddings") if isinstance(nested, dict) else None)
    if said is not None:
        return said is True
    return not _with_last((name.removesuffix(".weight") for name in base.tensors), OUTPUTS)


def _with_last(names: Iterable[str], wanted: Collection[str]) -> list[str]:
    """Those whose last component is one of ``wanted``."""
    return [name for name in names if name.rpartition(".")[2] in wanted]


def _alike(adapter: Adapter, first: str, second: str) -> bool:
    one, other = adapter.targets.get(first), adapter.targets.get(second)
    if one is not None and other is not None:
        return _same_update(one, other)
    saved, twin = adapter.extras.get(f"{first}.weight"), adapter.extras.get(f"{second}.weight")
    return saved is not None and twin is not None and torch.equal(saved, twin)


def _same_update(one: LowRank, other: LowRank) -> bool:
    """An embedding's update is ``A^T B^T``, its linear twin's ``B A``."""
    flipped = one.kind != other.kind
    a, b = (other.b.T, other.a.T) if flipped else (other.a, other.b)
    return one.scale == other.scale and torch.equal(one.a, a) and torch.equal(one.b, b)
