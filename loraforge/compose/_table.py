"""Every way to combine adapters, one row each."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from loraforge.adapter import Adapter
from loraforge.compose._linear import linear

Combine = Callable[..., Adapter]


@dataclass(frozen=True)
class Method:
    """A method: the function, one line about it, and where it comes from."""

    combine: Combine
    summary: str
    source: str


METHODS: Mapping[str, Method] = {
    "linear": Method(
        combine=linear,
        summary="the weighted sum of the updates; ranks add",
        source="task arithmetic, arXiv:2212.04089",
    ),
}
