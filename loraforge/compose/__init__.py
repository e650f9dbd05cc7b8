"""Adapters to adapter: one method is one pure function and one row of the table."""

from loraforge.compose._compare import Difference, compare, overall
from loraforge.compose._linear import linear, stack
from loraforge.compose._rerank import Reranked, RerankReport, TargetReport, rerank
from loraforge.compose._table import METHODS, Method

__all__ = [
    "METHODS",
    "Difference",
    "Method",
    "RerankReport",
    "Reranked",
    "TargetReport",
    "compare",
    "linear",
    "overall",
    "rerank",
    "stack",
]
