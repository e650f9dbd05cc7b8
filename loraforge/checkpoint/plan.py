"""What merging adapters does to each tensor of a checkpoint, decided and checked before a byte is written."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from loraforge.adapter import DTYPES, Adapter, LowRank
from loraforge.adapter.mapped import discard
from loraforge.checkpoint import ties
from loraforge.checkpoint.changes import Change, Dora, LowRankSum, Replaced, Rows, Sum, SumInTurn, Term
from loraforge.checkpoint.floats import FORMATS
from loraforge.checkpoint.homes import find_homes
from loraforge.checkpoint.reader import Checkpoint, TensorAt
from loraforge.errors import CompositionError
from loraforge_registry.layout import SUFFIXES, token_rows

COMPUTE = ("exact", "float32")
_BASE_ROWS = ".base_layer.weight"  # the base's own rows, which PEFT saves along with a targeted embedding


@dataclass(frozen=True, slots=True)
class Ingredient:
    """An adapter, its weight, and what messages call it."""

    adapter: Adapter
    weight: float
    label: str


@dataclass
class _Contributions:
    """What all adapters do to one tensor."""

    terms: list[Term] = field(default_factory=list)
    whole: list[tuple[Change, str]] = field(default_factory=list)  # what leaves no room for anything else
    labels: list[str] = field(default_factory=list)


def plan_changes(
    base: Checkpoint, ingredients: Sequence[Ingredient], *, compute: str = "exact", undoing: bool = False
) -> dict[str, Change]:
    """Return the change of every tensor that the adapters touch; ``undoing`` says that they are merged in already.

    Raises:
        CompositionError: a target without a home, shapes that differ, a quantised tensor, or adapters that cannot
            be merged together.
        NumericalError: NaN or infinity in a factor.
    """
    if compute not in COMPUTE:
        raise CompositionError(f"compute is {compute!r}; expected one of {', '.join(COMPUTE)}")
    if not ingredients:
        raise CompositionError("no adapters to merge")
    found: dict[str, _Contributions] = {}
    for ingredient in ingredients:
        _check_mergeable(ingredient, compute)
        for name, contribute in _contributions(base, ingredient, undoing=undoing):
            contribute(found.setdefault(name, _Contributions()))
            found[name].labels.append(ingredient.label)
    total = SumInTurn if compute == "float32" else Sum
    return {name: _change(name, parts, total) for name, parts in found.items()}


def _change(name: str, parts: _Contributions, total: type[Sum]) -> Change:
    if not parts.whole:
        return total(LowRankSum(name, parts.terms))
    first, kind = parts.whole[0]
    same = all(_same_values(first, other) for other, _ in parts.whole[1:])
    if parts.terms or not same:
        raise CompositionError(
            f"tensor {name!r} has {kind} from one adapter, and {' and '.join(sorted(set(parts.labels)))} do not agree "
            "on it; merge one of them alone, or leave its saved modules out"
        )
    return first


def _same_values(first: Change, other: Change) -> bool:
    if isinstance(first, Replaced) and isinstance(other, Replaced):
        return torch.equal(first.values, other.values)
    if isinstance(first, Rows) and isinstance(other, Rows):
        return first.places == other.places and torch.equal(first.values, other.values)
    return first is other


def _check_mergeable(ingredient: Ingredient, compute: str) -> None:
    adapter, label = ingredient.adapter, ingredient.label
    if adapter.settings.base_mutating_init:
        raise CompositionError(
            f"{label} was initialised by {adapter.settings.base_mutating_init}, which changes the base as well; "
            "convert it to plain LoRA first (PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...))"
        )
    for name, pair in adapter.targets.items():
        pair.check_finite(name)
        discard(pair.a)
        discard(pair.b)
        if pair.groups != 1:
            raise CompositionError(f"{label}: target {name!r} is a grouped convolution, which is not merged here")
        if pair.magnitude is not None and compute == "float32":
            raise CompositionError(f"{label} uses DoRA, which is merged with --compute exact only")
    not_additive = "DoRA" if any(p.magnitude is not None for p in adapter.targets.values()) else ""
    whole = [key for key in adapter.extras if not key.endswith(_BASE_ROWS)]
    not_additive = not_additive or ("whole saved tensors" if whole else "")
    if not_additive and ingredient.weight != 1:
        raise CompositionError(
            f"{label} has {not_additive}, which cannot be weighted by {ingredient.weight:g}; merge it with weight 1"
        )


def _contributions(
    base: Checkpoint, ingredient: Ingredient, *, undoing: bool
) -> Iterable[tuple[str, Callable[[_Contributions], None]]]:
    """Yield (tensor's name, how it is added to what happens to that tensor)."""
    label, weight = ingredient.label, ingredient.weight
    adapter = ties.written_once(base, ingredient.adapter, label)
    keys = [f"{target}.weight" for target in adapter.targets]
    keys += [f"{target}.bias" for target, pair in adapter.targets.items() if pair.bias is not None]
    # with bias="all" PEFT also saves the biases that a saved module had before, which nothing uses
    extras = {key: tensor for key, tensor in adapter.extras.items() if ".original_module." not in key}
    owners = {key: _owner(key) for key in extras}
    homes = find_homes([*dict.fromkeys([*keys, *owners.values()])], base.tensors, label)
    transposed = _transposed(base, adapter, homes, label)
    for target, pair in adapter.targets.items():
        home = base.tensors[homes[f"{target}.weight"]]
        terms = _term(home, target, pair, weight, transposed=target in transposed)
        yield home.entry.name, partial(_add_pair, target=target, pair=pair, term=terms, transposed=target in transposed)
        if pair.bias is not None:
            bias = base.tensors[homes[f"{target}.bias"]]
            _check(bias, tuple(pair.bias.shape), f"{label}: the bias of target {target!r}")
            column = pair.bias.reshape(-1, 1)
            yield bias.entry.name, partial(_add_term, term=Term(column, torch.ones(1, 1), weight * pair.scale))
    for key, tensor in extras.items():
        home = base.tensors[homes[owners[key]]]
        if key.endswith(_BASE_ROWS):
            if not undoing:
                _check_same(base, home, key, tensor)
            continue
        yield home.entry.name, _extra(home, key, tensor, adapter)


def _add_term(parts: _Contributions, term: Term) -> None:
    parts.terms.append(term)


def _add_pair(parts: _Contributions, target: str, pair: LowRank, term: Term, *, transposed: bool) -> None:
    if pair.magnitude is None:
        parts.terms.append(term)
        return
    by_row = pair.kind != "embedding" and not transposed
    parts.whole.append((Dora(LowRankSum(target, [term]), pair.magnitude, by_row), "a DoRA magnitude"))


def _add_whole(parts: _Contributions, change: Change, kind: str) -> None:
    parts.whole.append((change, kind))


def _term(home: TensorAt, target: str, pair: LowRank, weight: float, *, transposed: bool) -> Term:
    """Return a pair as the tensor sees it, a matrix of its first dimension by the rest."""
    a, b = pair.matrices
    shape = pair.shape[::-1] if transposed else pair.shape
    _check(home, shape, f"target {target!r}")
    coefficient = weight * pair.scale
    if transposed or pair.kind == "embedding":
        return Term(a.T, b.T, coefficient, flipped=True, looked_up=pair.kind == "embedding")
    return Term(b, a, coefficient)


def _extra(home: TensorAt, key: str, tensor: Tensor, adapter: Adapter) -> Callable[[_Contributions], None]:
    """Return what a whole tensor of the adapter does: rows of token embeddings, or everything, replaced."""
    rows = token_rows(key, adapter.settings)
    name = home.entry.name
    if rows is not None:
        _check(home, (home.entry.shape[0], *tensor.shape[1:]), f"{key!r}")
        if max(rows, default=0) >= home.entry.shape[0]:
            raise CompositionError(f"{key!r} has a row for token {max(rows)}; {name!r} has {home.entry.shape[0]} rows")
        change: Change = Rows({row: place for place, row in enumerate(rows)}, tensor)
        return partial(_add_whole, change=change, kind="trained token rows")
    if home.entry.dtype not in DTYPES or tuple(tensor.shape) != home.entry.shape or not tensor.numel():
        _check(home, tuple(tensor.shape), f"saved tensor {key!r}")
    if tensor.is_floating_point() != DTYPES[home.entry.dtype].is_floating_point:
        raise CompositionError(f"saved tensor {key!r} is {tensor.dtype}, the base's {name!r} is {home.entry.dtype}")
    if not tensor.is_floating_point() and not torch.equal(tensor.to(DTYPES[home.entry.dtype]), tensor):
        raise CompositionError(
            f"saved tensor {key!r} has numbers that the base's {name!r}, {home.entry.dtype}, cannot hold"
        )
    values = tensor.reshape(tensor.shape[0], -1) if tensor.dim() else tensor.reshape(1, 1)
    return partial(_add_whole, change=Replaced(values), kind="a whole saved tensor")


def _owner(key: str) -> str:
    """The base's parameter that an extra tensor stands for."""
    if key.endswith(SUFFIXES["tokens"]):
        return key.removesuffix(SUFFIXES["tokens"]) + ".weight"
    return key.replace(".base_layer.", ".").replace(".modules_to_save.", ".")


def _check(home: TensorAt, shape: tuple[int, ...], what: str) -> None:
    name, dtype = home.entry.name, home.entry.dtype
    if DTYPES.get(dtype) not in FORMATS:
        raise CompositionError(
            f"{name!r} is {dtype}: a quantised tensor cannot be merged into; merge into the original weights (BF16, "
            "F16, F32, F64), then quantise"
        )
    if not home.entry.elements:
        raise CompositionError(f"{what}: the base's {name!r} has no elements")
    if home.entry.shape != shape:
        raise CompositionError(
            f"{what} is for a tensor of shape {list(shape)}, the base's {name!r} has {list(home.entry.shape)}"
        )


def _check_same(base: Checkpoint, home: TensorAt, key: str, tensor: Tensor) -> None:
    """Refuse a saved embedding that is not the base's: another vocabulary, or another model."""
    _check(home, tuple(tensor.shape), f"saved tensor {key!r}")
    raw = bytearray(home.nbytes)
    base.read_into(home, 0, memoryview(raw))
    ours = torch.frombuffer(raw, dtype=DTYPES[home.entry.dtype]).reshape(home.entry.shape)
    # trained in a wider type or in a shorter one than that of the file
    if not (torch.equal(ours, tensor.to(ours.dtype)) or torch.equal(ours.to(tensor.dtype), tensor)):
        raise CompositionError(
            f"{key!r} is not the base's {home.entry.name!r}: the adapter was trained on another base"
        )


def _transposed(base: Checkpoint, adapter: Adapter, homes: Mapping[str, str], label: str) -> set[str]:
    """Return the targets whose weight lies (in, out), as transformers' Conv1D keeps it.

    A shape that is not square tells. For square ones the config's fan_in_fan_out does, or the adapter's other targets
    (PEFT writes what the last module it saw was): if these disagree, nothing can tell.
    """
    linear = {name: pair for name, pair in adapter.targets.items() if pair.kind == "linear"}
    shapes = {name: base.tensors[homes[f"{name}.weight"]].entry.shape for name in linear}
    decided = {name for name, pair in linear.items() if pair.shape[0] != pair.shape[1]}
    found = {name for name in decided if shapes[name] == linear[name].shape[::-1]}
    evidence = {name in found for name in decided}
    square = set(linear) - decided
    if not square or (evidence != {True} and not adapter.settings.fan_in_fan_out):
        return found
    if evidence == {True, False} or (evidence == {False} and adapter.settings.fan_in_fan_out):
        raise CompositionError(
            f"{label}: target {min(square)!r} is square, and whether its weight is transposed (fan_in_fan_out) cannot "
            "be told: its other targets say otherwise"
        )
    return found | square
