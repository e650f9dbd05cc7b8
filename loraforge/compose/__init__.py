"""Adapters to adapter: one method is one pure function and one row of the table."""

from loraforge.compose._additive import Term
from loraforge.compose._compare import Difference, compare, overall
from loraforge.compose._exact_sum import exact_sum
from loraforge.compose._explain import Explanation, Part, explain
from loraforge.compose._linear import linear, stack
from loraforge.compose._rerank import Reranked, RerankReport, TargetReport, rerank
from loraforge.compose._select import layer_of, layers_of, select
from loraforge.compose._spectrum import spectra
from loraforge.compose._table import LATEST, METHODS, OPERATIONS, Kind, Operation, check_parameters, perform

__all__ = [
    "LATEST",
    "METHODS",
    "OPERATIONS",
    "Difference",
    "Explanation",
    "Kind",
    "Operation",
    "Part",
    "RerankReport",
    "Reranked",
    "TargetReport",
    "Term",
    "check_parameters",
    "compare",
    "exact_sum",
    "explain",
    "layer_of",
    "layers_of",
    "linear",
    "overall",
    "perform",
    "rerank",
    "select",
    "spectra",
    "stack",
]
