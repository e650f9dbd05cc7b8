"""Spectra: the singular values of every update, from its factors."""

import math

import torch

from loraforge import lowrank
from loraforge.adapter import Adapter, LowRank
from loraforge.errors import NumericalError
from loraforge_registry.spectrum import Spectrum


def spectra(adapter: Adapter) -> dict[str, Spectrum]:
    """Return the singular values of ``scale * B @ A`` by target.

    A grouped convolution, which is no one product, has none.
    With DoRA that is the update before its magnitudes, which depend on the base.

    Numerics: float64; right to about 1e-15 of the largest singular values of both factors together.
    Cost: O((m + n) r^2 + r^3) for each target; the (m, n) product is never formed.

    Raises:
        NumericalError: NaN or infinity in a factor, or an update beyond float64.
    """
    return {name: _spectrum(name, pair) for name, pair in adapter.targets.items() if pair.groups == 1}


def _spectrum(name: str, pair: LowRank) -> Spectrum:
    pair.check_finite(name)
    try:
        values = tuple((lowrank.singular_values(*pair.matrices) * abs(pair.scale)).tolist())
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined] # what it says of infinity
        values = (math.inf,)
    if not all(map(math.isfinite, values)):
        raise NumericalError(f"target {name!r}: its update is beyond the range of float64")
    return Spectrum(values)
