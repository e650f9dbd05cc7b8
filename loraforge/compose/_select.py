r"""Part of an adapter: some of its targets, and weights that change from layer to layer.

Equation: with N layers and k values v, the update in layer l is multiplied by ``(1 - f) v_i + f v_(i+1)`` where
``i + f = l (k - 1) / (N - 1)``, i whole: v_0 in the first layer, v_(k-1) in the last, straight lines between.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from loraforge.adapter import Adapter, LowRank, identity
from loraforge.compose._additive import check_additive, without_extras
from loraforge.errors import CompositionError
from loraforge_registry.canonical import Value
from loraforge_registry.config import MAX_ALPHA, MIN_ALPHA, Settings
from loraforge_registry.layout import Targeted
from loraforge_registry.manifest import Derivation, Input
from loraforge_registry.patterns import ATTENTION, Matcher, suffixes

Patterns = Sequence[str] | str
"""Names, which are the ends of module paths; or ``all-linear``, ``attention``, or one regular expression."""

_LISTED = 8
MAX_LAYERS = 2**20


def select(
    adapter: Adapter,
    *,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    gradient: Sequence[float] = (),
    layers: int | None = None,
    drop_saved: bool = False,
) -> Adapter:
    """Return the adapter with only some targets, each update times the weight of its layer.

    Factors stay bit for bit; only alphas change. A target whose weight is zero is left out.

    Args:
        adapter: whose targets to choose from.
        include: the targets to keep, in the language of ``target_modules``; without it all.
        exclude: targets to leave out of these.
        gradient: weights from the first layer to the last, interpolated between.
        layers: how many layers the base has; without it those up to the last that the adapter has a target in.
        drop_saved: leave out whole saved tensors, of which there is no part.

    Raises:
        CompositionError: nothing asked for; a name that matches no target, or nothing left; a gradient over a target
            outside any layer; whole saved tensors; what is not additive.
        ConfigError: a pattern that is no regular expression, or takes too long.
    """
    check_selection(include=include, exclude=exclude, gradient=gradient, layers=layers)
    check_additive(adapter)
    recorded = identity(adapter)
    adapter = without_extras(adapter) if drop_saved else adapter
    if adapter.extras:
        raise CompositionError(
            f"the adapter holds {min(adapter.extras)!r}, which replaces a weight of the base: there is no part of "
            "that; leave such tensors out (drop_saved)"
        )
    names = chosen(adapter, include, exclude)
    count = layers_of(adapter.targets) if layers is None else layers
    weight_of = _weights(gradient, count)
    pairs = {name: _scaled(name, adapter.targets[name], weight_of(name)) for name in names}
    targets = {name: pair for name, pair in pairs.items() if pair is not None}
    if not targets:
        raise CompositionError("every target that is left has the weight 0: nothing remains")
    settings = replace(
        adapter.settings, target_modules=None, exclude_modules=None, layers_to_transform=None, layers_pattern=()
    )
    parameters = _record(include, exclude, gradient, count) | ({"drop_saved": True} if drop_saved else {})
    derivation = Derivation("select", 1, (Input(recorded),), parameters)
    return Adapter(targets, settings, adapter.extras, derivation=derivation)


def check_selection(
    *,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    gradient: Sequence[float] = (),
    layers: int | None = None,
    drop_saved: bool = False,  # noqa: ARG001 - the parameters of ``select``
) -> None:
    """Refuse what can be seen to be wrong without an adapter.

    Raises:
        CompositionError, ConfigError: as ``select``.
    """
    if include is None and exclude is None and not gradient:
        raise CompositionError("nothing to select by: say include, exclude or gradient")
    for what, wanted in (("include", include), ("exclude", exclude)):
        if wanted is not None and not wanted:
            raise CompositionError(f"{what} is empty: it means no target")
        if isinstance(wanted, str):
            Matcher().full_match(wanted, "")
    for value in gradient:
        if not math.isfinite(value):
            raise CompositionError(f"gradient holds {value}; expected finite numbers")
    if layers is not None and not 1 <= layers <= MAX_LAYERS:
        raise CompositionError(f"layers is {layers}; expected 1 to {MAX_LAYERS}")
    if layers is not None and not gradient:
        raise CompositionError("layers goes with a gradient")


def chosen(adapter: Adapter, include: Patterns | None, exclude: Patterns | None) -> list[str]:
    """Return the targets that a filter keeps.

    Raises:
        CompositionError: a name that matches no target, or no target left.
    """
    kept = list(adapter.targets) if include is None else _matched("include", include, adapter)
    left_out = set() if exclude is None else set(_matched("exclude", exclude, adapter))
    found = [name for name in kept if name not in left_out]
    if not found:
        raise CompositionError(f"exclude leaves out every target{' that include keeps' * (include is not None)}")
    return found


def _matched(what: str, wanted: Patterns, adapter: Adapter) -> list[str]:
    """Return the targets that patterns mean; one that means none is a typing error."""
    ends = {end for name in adapter.targets for end in suffixes(name)}
    missing = [] if isinstance(wanted, str) else [name for name in wanted if name not in ends]
    meant = ATTENTION if wanted == "attention" else wanted if isinstance(wanted, str) else tuple(wanted)
    targeted = Targeted(Settings(target_modules=meant), Matcher())
    found = [name for name, pair in adapter.targets.items() if targeted.includes(name, pair.kind)]
    if missing or not found:
        odd = repr(missing[0] if missing else wanted)
        raise CompositionError(f"{what}: {odd} matches no target; the adapter has {_ends(adapter.targets)}")
    return found


def layers_of(names: Iterable[str]) -> int:
    """Return the number of layers up to the last that a name is in; 0 where none is in any."""
    return 1 + max((index for name in names if (index := layer_of(name)) is not None), default=-1)


def layer_of(name: str) -> int | None:
    """Return the layer of a module path: the first number in it, ``model.layers.3.mlp.experts.7`` being in layer 3."""
    return next((int(part) for part in name.split(".") if part.isascii() and part.isdigit() and len(part) < 10), None)


def _weights(gradient: Sequence[float], layers: int) -> Callable[[str], float]:
    if not gradient:
        return lambda _name: 1.0

    def weight(name: str) -> float:
        layer = layer_of(name)
        if layer is None:
            raise CompositionError(
                f"target {name!r} is in no layer, so a gradient gives it no weight; exclude it here, and add it by a "
                "term of its own"
            )
        if layer >= layers:
            raise CompositionError(f"target {name!r} is beyond the {layers} layers of the gradient")
        return interpolated(gradient, layer, layers)

    return weight


def interpolated(values: Sequence[float], layer: int, layers: int) -> float:
    """Return the weight of a layer (the module's equation)."""
    position = layer * (len(values) - 1) / (layers - 1) if layers > 1 else 0.0
    low = min(int(position), len(values) - 1)
    high, share = min(low + 1, len(values) - 1), position - low
    return (1 - share) * values[low] + share * values[high]


def _scaled(name: str, pair: LowRank, weight: float) -> LowRank | None:
    if weight in (0, 1):
        return pair if weight else None
    alpha = pair.alpha * weight
    if not MIN_ALPHA <= abs(alpha) <= MAX_ALPHA:
        raise CompositionError(f"target {name!r}: the weight {weight:g} gives an alpha of {alpha:g}, beyond any use")
    return replace(pair, alpha=alpha)


def _record(
    include: Patterns | None, exclude: Patterns | None, gradient: Sequence[float], layers: int
) -> dict[str, Value]:
    found: dict[str, Value] = {}
    for what, wanted in (("include", include), ("exclude", exclude)):
        if wanted is not None:
            found[what] = wanted if isinstance(wanted, str) else [*sorted(set(wanted))]
    if gradient:
        found |= {"gradient": [float(value) + 0.0 for value in gradient], "layers": layers}  # + 0.0: no -0.0
    return found


def _ends(names: Iterable[str]) -> str:
    ends = sorted({name.rpartition(".")[2] for name in names})
    return ", ".join(map(repr, ends[:_LISTED])) + (f" and {len(ends) - _LISTED} more" if len(ends) > _LISTED else "")
