r"""A LoRA out of a full fine-tune: ``D = W' - W``, tensor by tensor, and the best ``B A`` for it at a low rank.

Weights are kept in 16 bits, so W' is the trained weight with a rounding error in every element: D is a low-rank signal
in noise. Its best approximation at the signal's rank is nearer to what was trained than D itself, and the rank can be
read off the spectrum: hardly a singular value of the noise alone lies above its edge, ``sigma (sqrt m + sqrt n)`` for
one variance sigma^2 everywhere (``noise``).
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn, cast

import torch
from torch import Tensor

from loraforge import lowrank
from loraforge.adapter import Adapter, LowRank
from loraforge.checkpoint.model_config import ModelConfig, read_config, stored_transposed
from loraforge.checkpoint.noise import Squares, edge_of, rounding_noise, squares
from loraforge.checkpoint.roles import Roles, Save, assign, last_of, listing, module_of
from loraforge.checkpoint.sketch import Wanted, residual, sketch
from loraforge.checkpoint.ties import INPUTS, OUTPUTS
from loraforge.checkpoint.twins import Twins, difference, open_twins
from loraforge.errors import CompositionError, NumericalError
from loraforge_registry.canonical import Value
from loraforge_registry.config import Settings
from loraforge_registry.manifest import Derivation, Input
from loraforge_registry.paths import AnyPath

EDGE = 1.02  # how far above the edge of the noise a singular value must be to count: the edge itself wavers by less
_FIRST = 24  # directions of a sketch's block
_ROUNDING = 1e-6  # singular values below this share of the first are rounding of float32 products
_MOST = 2**53


@dataclass(frozen=True)
class ExtractedTarget:
    """What was extracted of one weight.

    ``norm`` is |D|_F, ``captured`` the share ``|D_k|_F^2 / |D|_F^2``, ``error`` is ``|D - B A|_F / |D|_F`` of the
    factors as they are; ``noise`` the share of |D|_F^2 to expect of the rounding of W' (``sum_ij ulp(W'_ij)^2 / 12``),
    ``edge`` the largest singular value to expect of it. ``spectrum`` are the largest singular values of D as far as
    they were computed, descending; behind the rank they are lower bounds.
    """

    rank: int
    norm: float
    captured: float
    error: float
    noise: float
    edge: float
    spectrum: tuple[float, ...]


@dataclass(frozen=True)
class ExtractReport:
    """What was extracted: by target, and over all of them (shares of the energy of everything).

    ``saved`` are tensors kept whole, ``left_out`` changed tensors that the adapter does not have, with the norm of
    their change (None where none can be computed); ``unchanged`` counts tensors that are equal in both checkpoints.
    """

    targets: Mapping[str, ExtractedTarget]
    captured: float
    error: float
    noise: float
    saved: tuple[str, ...]
    left_out: Mapping[str, float | None]
    unchanged: int

    def as_record(self) -> dict[str, Value]:
        """The part that a manifest keeps; six digits, so that equal work on other machines gives equal records."""
        targets: dict[str, Value] = {
            name: {"captured": _six(t.captured), "error": _six(t.error), "noise": _six(t.noise), "rank": t.rank}
            for name, t in self.targets.items()
        }
        return {
            "captured": _six(self.captured),
            "error": _six(self.error),
            "left_out": ", ".join(sorted(self.left_out)),
            "noise": _six(self.noise),
            "saved": len(self.saved),
            "targets": targets,
            "unchanged": self.unchanged,
        }


@dataclass(frozen=True)
class Extracted:
    """An extracted adapter, and how much of the fine-tune it holds."""

    adapter: Adapter
    report: ExtractReport


@dataclass(frozen=True)
class _Criterion:
    """How a rank is chosen: exactly one of the first three."""

    rank: int | None
    energy: float | None
    auto: bool
    max_rank: int
    oversample: int
    seed: int

    @property
    def most(self) -> int:
        """The greatest rank."""
        return self.max_rank if self.rank is None else self.rank

    def count(self, s: Tensor, total: float, edge: float) -> int:
        """Return the rank that singular values of a matrix of ``|D|^2 = total`` ask for, if enough are there."""
        if self.rank is not None:
            return self.rank
        if self.auto:
            return int((s > EDGE * edge).sum())
        share = cast("float", self.energy)
        return int((s.square().cumsum(0) < share * total).sum()) + 1


def extract(  # noqa: PLR0913 - a criterion, its limits, and what the files do not say: all keyword-only
    base: AnyPath,
    finetuned: AnyPath,
    *,
    rank: int | None = None,
    energy: float | None = None,
    auto: bool = False,
    max_rank: int = 128,
    save: Save = (),
    drop: Sequence[str] = (),
    fan_in_fan_out: bool | None = None,
    base_name: str | None = None,
    oversample: int = 8,
    seed: int = 0,
) -> Extracted:
    r"""Return the LoRA that, on ``base``, comes nearest to ``finetuned``.

    Exactly one of ``rank``, ``energy`` and ``auto`` says how large. Each float matrix that changed becomes a target
    of scale 1, but for embeddings and output heads; these, and all else that changed, are kept whole or left out as
    ``save`` and ``drop`` say. A changed tensor that neither is an error.

    Args:
        base: a checkpoint: a directory, or one safetensors file.
        finetuned: another of the same model.
        rank: of every target (less where D has less).
        energy: the smallest rank for each target that holds this share of its ``|D|_F^2``.
        auto: the number of singular values above 1.02 times the edge of the rounding noise: what rounding cannot
            explain; 1 where there is none.
        max_rank: with energy and auto, the greatest.
        save: ``"auto"`` keeps every changed tensor that is no target whole; a list of module or tensor names, or
            their ends, keeps those (targets among them, too); ``"none"`` leaves all out that are no targets.
        drop: names, or their ends, to leave out: recorded in the report.
        fan_in_fan_out: whether weights lie (in, out), as transformers' Conv1D keeps them; without it config.json and
            the lengths of biases tell.
        base_name: what the adapter calls its base; without it what the base's config.json does.
        oversample: directions beyond the rank in the sketch.
        seed: of the sketch.

    Shapes: W, W' (m, n) -> a (k, n), b (m, k).
    Numerics: D in float32 (float64 for float64 weights), a block Krylov sketch of it with its core in float64;
        ``B = U S^(1/2)``, ``A = S^(1/2) V^T`` rounded to float32. The error is some 1e-4 of itself above the best.
    Cost: reads both once (embeddings that are saved, twice); 12 to 20 m n (k + oversample) operations for a target;
        memory of four copies of the largest 16-bit matrix, its sketch, and the result.

    Raises:
        NotFoundError, FormatError: no checkpoint, or one that is refused.
        CompositionError: not exactly one criterion; checkpoints of different models; a changed tensor that has no
            place; quantised or integer tensors that differ; nothing to extract.
        NumericalError: NaN or infinity in a tensor that changed.
        ConflictError: a file changed while it was read.
    """
    criterion = _Criterion(rank, energy, auto, max_rank, oversample, seed)
    parameters = _check_criterion(criterion) | _choices(save, drop)
    with open_twins(base, finetuned) as twins:
        config = read_config(twins.before.checkpoint)
        roles = assign(twins, save, drop)
        transposed = stored_transposed(twins.after.checkpoint, roles.targets, config, said=fan_in_fan_out)
        config = replace(config, transposed=transposed)
        found = {module_of(n): _extract_one(twins, n, criterion, transposed=transposed) for n in roles.targets}
        done = {name: result for name, result in sorted(found.items()) if result is not None}
        if not done:
            raise CompositionError(_nothing(roles))
        extras = _extras(twins, roles, config, done)
        inputs = (Input(twins.after.digest(), 1.0), Input(twins.before.digest(), -1.0))
    adapter = Adapter(
        targets={name: pair for name, (pair, _) in done.items()},
        settings=_settings(roles, config, extras, base_name),
        extras=extras,
        derivation=Derivation("extract", 1, inputs, parameters),
    )
    return Extracted(adapter, _overall({name: report for name, (_, report) in done.items()}, extras, roles, twins))


def _read_delta(twins: Twins, name: str) -> tuple[Tensor, Squares] | None:
    """Return D and the variances of the rounding of W'; None where nothing changed."""
    pair = twins.read(name)
    return None if pair is None else (difference(*pair, twins.space), rounding_noise(pair[1]))


def _extract_one(
    twins: Twins, name: str, criterion: _Criterion, *, transposed: bool
) -> tuple[LowRank, ExtractedTarget] | None:
    """Sketch D, choose a rank from what is found, truncate; None where D is zero."""
    read = _read_delta(twins, name)
    if read is None:
        return None
    d, rounding = read
    size = squares(d)
    total = size.total
    if not math.isfinite(total):
        _refuse_infinite(twins, name)
    if total == 0:  # a zero's sign, or another type
        return None
    d = d.T if transposed else d
    # an update below half an ulp is lost, which leaves less than full rounding: no more than there is
    noise = rounding.at_most(size)
    edge = edge_of(noise)
    wanted = Wanted(lambda s: criterion.count(s, total, edge), criterion.most, criterion.oversample)
    width = min(criterion.most, _FIRST) + criterion.oversample
    found = sketch(d, total, wanted, width, criterion.seed)
    rank = _rank(found.s, criterion, total, edge)
    a, b = (factor.to(torch.float32).contiguous() for factor in lowrank.truncate(found, rank))
    pair = LowRank("linear", a, b, alpha=float(rank))
    pair.check_finite(module_of(name))  # factors of a huge D can leave float32
    report = ExtractedTarget(
        rank=rank,
        norm=math.sqrt(total),
        captured=min(1.0, float(found.s[:rank].square().sum()) / total),
        error=math.sqrt(residual(d, a, b) / total),
        noise=noise.total / total,
        edge=edge,
        spectrum=tuple(found.s.tolist()),
    )
    return pair, report


def _rank(s: Tensor, criterion: _Criterion, total: float, edge: float) -> int:
    """The rank asked for, within the limit and what is there; at least 1."""
    there = int((s > _ROUNDING * s[0]).sum())
    return max(1, min(criterion.count(s, total, edge), criterion.most, there))


def _refuse_infinite(twins: Twins, name: str) -> NoReturn:
    for side in (twins.before, twins.after):
        side.check_finite(name, side.typed(name, side.raw(name)))
    raise NumericalError(f"tensor {name!r}: the difference of the two checkpoints is beyond float32")


def _extras(twins: Twins, roles: Roles, config: ModelConfig, targets: Collection[str]) -> dict[str, Tensor]:
    """Return the tensors that are kept whole, by PEFT's key: a saved module needs all it has."""
    modules = frozenset(roles.modules)
    names = [name for name in twins.after.checkpoint.tensors if module_of(name) in modules]
    extras = {name: twins.saved(name) for name in names}
    for name in roles.biases:
        module = module_of(name)
        extras[f"{module}.base_layer.bias" if module in targets else name] = twins.saved(name)
    for module in roles.modules:
        if last_of(module) == "shared":
            raise CompositionError(
                f"{module!r} changed, an embedding that encoder and decoder share under other names: PEFT cannot save "
                "it for both; drop it"
            )
        if config.tied and config.head and last_of(module) in INPUTS:
            extras[f"{config.head}.weight"] = extras[f"{module}.weight"]  # loaders of any age then change both
    return extras


def _settings(roles: Roles, config: ModelConfig, extras: Collection[str], base_name: str | None) -> Settings:
    biases = set(extras) & {*roles.biases, *(f"{module_of(name)}.base_layer.bias" for name in roles.biases)}
    saved = tuple(sorted({module_of(key) for key in set(extras) - biases}))
    return Settings(
        base_name=base_name or config.name,
        task_type=config.task_type,
        modules_to_save=saved,
        bias="all" if biases else "none",
        fan_in_fan_out=config.transposed is True,
        weight_tying=config.tied and any(last_of(module) in INPUTS | OUTPUTS for module in saved),
    )


def _overall(
    targets: Mapping[str, ExtractedTarget], extras: Collection[str], roles: Roles, twins: Twins
) -> ExtractReport:
    total = sum(t.norm**2 for t in targets.values())
    shares = {
        what: sum(share * t.norm**2 for share, t in zip(values, targets.values(), strict=True)) / total
        for what, values in {
            "captured": [t.captured for t in targets.values()],
            "lost": [t.error**2 for t in targets.values()],
            "noise": [t.noise for t in targets.values()],
        }.items()
    }
    before, after = twins.before.digests, twins.after.digests
    return ExtractReport(
        targets=targets,
        captured=shares["captured"],
        error=math.sqrt(shares["lost"]),
        noise=shares["noise"],
        saved=tuple(sorted(extras)),
        left_out=roles.left_out,
        unchanged=sum(before[name] == after[name] for name in twins.shared),
    )


def _check_criterion(criterion: _Criterion) -> dict[str, Value]:
    """Refuse what is no criterion, and return it as a derivation records it."""
    given: dict[str, Value] = {
        key: value
        for key, value in (("rank", criterion.rank), ("energy", criterion.energy), ("auto", criterion.auto or None))
        if value is not None
    }
    if len(given) != 1:
        raise CompositionError(f"{' and '.join(given) or 'nothing'} given; say exactly one of rank, energy, auto")
    if criterion.energy is not None and not 0 < criterion.energy <= 1:
        raise CompositionError(f"energy is {criterion.energy}; expected a share above 0, up to 1")
    for name, value, least in (
        ("rank", criterion.rank, 1),
        ("max_rank", criterion.max_rank, 1),
        ("oversample", criterion.oversample, 1),
        ("seed", criterion.seed, 0),
    ):
        if value is not None and not least <= value <= _MOST:
            raise CompositionError(f"{name} is {value}; expected {least} to {_MOST}")
    limit: dict[str, Value] = {} if criterion.rank is not None else {"max_rank": criterion.max_rank}
    return given | limit | {"oversample": criterion.oversample, "seed": criterion.seed}


def _choices(save: Save, drop: Sequence[str]) -> dict[str, Value]:
    said = save if isinstance(save, str) else ", ".join(sorted(save))
    found: dict[str, Value] = {"save": said} if said else {}
    return found | ({"drop": ", ".join(sorted(drop))} if drop else {})


def _nothing(roles: Roles) -> str:
    others = [*roles.modules, *roles.biases, *roles.left_out]
    if others:
        return f"no matrix that can be a LoRA target changed; only {listing(others)} did"
    return "the two checkpoints are equal: there is nothing to extract"


def _six(number: float) -> float:
    return float(f"{number:.6g}")
