"""git and docker for LoRA adapters, with exact linear algebra.

    import loraforge as lf

    blend = lf.linear([(lf.load("french:v1"), 0.7), (lf.load("./law"), 0.3)])
    small = lf.rerank(blend, rank=16)
    small.report.error                          # |dW - dW_16| / |dW| over all targets
    lf.save(small.adapter, "out/")              # a directory PEFT loads
    lf.Registry().push(small, "blend:v1")            # with its lineage and its error

Importing this package imports neither torch nor anything else that is slow; names arrive when they are used.
"""

import importlib
from typing import TYPE_CHECKING

from loraforge.version import __version__
from loraforge_registry.errors import LoraforgeError

if TYPE_CHECKING:
    from loraforge.adapter import Adapter, BaseModel, LowRank, content_id
    from loraforge.checkpoint.extract import Extracted, extract
    from loraforge.checkpoint.inplace import merge_in_place, unmerge_in_place
    from loraforge.checkpoint.merge import merge, preview_merge, unmerge
    from loraforge.checkpoint.result import MergeResult
    from loraforge.checkpoint.verify import VerifyReport, verify_merge
    from loraforge.compose import (
        METHODS,
        Explanation,
        Reranked,
        RerankReport,
        TargetReport,
        linear,
        rerank,
        select,
        stack,
    )
    from loraforge.formats.peft import save
    from loraforge.layers import Injected, LoraConfig, attach, inject
    from loraforge.recipe import Rebuilt, Recipe, explain, explain_layers, rebuild
    from loraforge.registry import Registry, load
    from loraforge.training import Halving, Member, Metrics, TrainConfig, Trained, train, train_many
    from loraforge.tree import Node, Tree

_HOMES = {
    "Adapter": "loraforge.adapter",
    "BaseModel": "loraforge.adapter",
    "Explanation": "loraforge.compose",
    "Extracted": "loraforge.checkpoint.extract",
    "Halving": "loraforge.training",
    "Injected": "loraforge.layers",
    "LoraConfig": "loraforge.layers",
    "LowRank": "loraforge.adapter",
    "METHODS": "loraforge.compose",
    "Metrics": "loraforge.training",
    "Member": "loraforge.training",
    "MergeResult": "loraforge.checkpoint.result",
    "Node": "loraforge.tree",
    "Rebuilt": "loraforge.recipe",
    "Recipe": "loraforge.recipe",
    "Registry": "loraforge.registry",
    "RerankReport": "loraforge.compose",
    "Reranked": "loraforge.compose",
    "TargetReport": "loraforge.compose",
    "TrainConfig": "loraforge.training",
    "Trained": "loraforge.training",
    "Tree": "loraforge.tree",
    "VerifyReport": "loraforge.checkpoint.verify",
    "attach": "loraforge.layers",
    "content_id": "loraforge.adapter",
    "explain": "loraforge.recipe",
    "explain_layers": "loraforge.recipe",
    "extract": "loraforge.checkpoint.extract",
    "inject": "loraforge.layers",
    "linear": "loraforge.compose",
    "load": "loraforge.registry",
    "merge": "loraforge.checkpoint.merge",
    "merge_in_place": "loraforge.checkpoint.inplace",
    "preview_merge": "loraforge.checkpoint.merge",
    "rebuild": "loraforge.recipe",
    "rerank": "loraforge.compose",
    "save": "loraforge.formats.peft",
    "select": "loraforge.compose",
    "stack": "loraforge.compose",
    "train": "loraforge.training",
    "train_many": "loraforge.training",
    "unmerge": "loraforge.checkpoint.merge",
    "unmerge_in_place": "loraforge.checkpoint.inplace",
    "verify_merge": "loraforge.checkpoint.verify",
}

__all__ = [
    "METHODS",
    "Adapter",
    "BaseModel",
    "Explanation",
    "Extracted",
    "Halving",
    "Injected",
    "LoraConfig",
    "LoraforgeError",
    "LowRank",
    "Member",
    "MergeResult",
    "Metrics",
    "Node",
    "Rebuilt",
    "Recipe",
    "Registry",
    "RerankReport",
    "Reranked",
    "TargetReport",
    "TrainConfig",
    "Trained",
    "Tree",
    "VerifyReport",
    "__version__",
    "attach",
    "content_id",
    "explain",
    "explain_layers",
    "extract",
    "inject",
    "linear",
    "load",
    "merge",
    "merge_in_place",
    "preview_merge",
    "rebuild",
    "rerank",
    "save",
    "select",
    "stack",
    "train",
    "train_many",
    "unmerge",
    "unmerge_in_place",
    "verify_merge",
]


def __getattr__(name: str) -> object:
    """Import a public name's module when the name is first used (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
