"""What becomes of every tensor of a fine-tune: a LoRA target, saved whole, left out, or nothing since it is unchanged.

A target is a float matrix called ``<module>.weight``, of a module that is neither an embedding nor an output head.
Everything else that changed is saved whole, or left out, only where the caller says so.
"""

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from loraforge.checkpoint.noise import squares
from loraforge.checkpoint.twins import Twins, difference
from loraforge.errors import CompositionError

Save: TypeAlias = Literal["auto", "none"] | Sequence[str]
# the last component of modules that look rows up, or give the output: a low-rank update of those is rarely meant
_NO_TARGET = re.compile(
    r".*embed.*|wte|wpe|shared|relative_attention_bias|lm_head|head|output|output_layer|score|classifier|qa_outputs"
)
_LISTED = 4


@dataclass(frozen=True, slots=True)
class Roles:
    """The part that each changed tensor plays.

    ``targets`` are tensors that may have changed, ``modules`` are saved with all their tensors, ``biases`` are tensors
    saved alone. ``left_out`` gives the Frobenius norm of the change, None where there is no difference to take.
    """

    targets: tuple[str, ...]
    modules: tuple[str, ...]
    biases: tuple[str, ...]
    left_out: Mapping[str, float | None]


def assign(twins: Twins, save: Save, drop: Sequence[str]) -> Roles:
    """Decide, having read everything but the targets.

    Raises:
        CompositionError: the checkpoints do not hold the same tensors, a changed tensor has no part to play, or
            one that cannot be played in PEFT.
        NumericalError: NaN or infinity in a tensor that is left out.
    """
    if isinstance(save, str) and save not in ("auto", "none"):
        raise CompositionError(f"save is {save!r}; expected 'auto', 'none' or a list of module names")
    entries = () if isinstance(save, str) else tuple(save)
    names = [*twins.shared, *twins.single]
    _check_entries("save", entries, names)
    _check_entries("drop", drop, names)
    dropped = {name: None for name in names if _is_meant(name, drop)}
    _check_same(twins, dropped)
    kept = [name for name in twins.shared if name not in dropped]
    may_be = {name for name in kept if _may_be_target(twins, name) and not _is_meant(name, entries)}
    others = _changed(twins, [name for name in kept if name not in may_be])
    if save == "none":
        dropped |= dict.fromkeys(others)
    elif save != "auto":
        _check_saved([name for name in others if not _is_meant(name, entries)])
    saved = others if save != "none" else []
    modules = _modules_to_save(saved, names, may_be, dropped)
    return Roles(
        targets=tuple(name for name in kept if name in may_be and module_of(name) not in modules),
        modules=tuple(modules),
        biases=tuple(name for name in saved if module_of(name) not in modules),
        left_out={name: change for name in dropped for change in _left_out(twins, name)},
    )


def module_of(name: str) -> str:
    """The module that a tensor belongs to."""
    return name.rpartition(".")[0]


def last_of(module: str) -> str:
    """The last component of a dotted path."""
    return module.rpartition(".")[2]


def listing(names: Collection[str]) -> str:
    """Name the first few."""
    shown = ", ".join(map(repr, sorted(names)[:_LISTED]))
    return shown + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")


def _is_meant(name: str, entries: Iterable[str]) -> bool:
    """Whether an entry is the end of a tensor's path, or of its module's."""
    ends = (f".{name}", f".{module_of(name)}")
    return any(end.endswith(f".{entry}") for entry in entries for end in ends)


def _may_be_target(twins: Twins, name: str) -> bool:
    module, _, parameter = name.rpartition(".")
    matrix = parameter == "weight" and len(twins.shape(name)) == 2 and module != ""
    return matrix and twins.are_floats(name) and not _NO_TARGET.fullmatch(last_of(module))


def _changed(twins: Twins, names: Iterable[str]) -> list[str]:
    """Those whose numbers differ: a zero may change its sign, and a type its width."""
    found = []
    for name in names:
        pair = twins.read(name)
        if pair is not None and bool((pair[0] != pair[1]).any()):
            found.append(name)
    return found


def _modules_to_save(
    saved: Sequence[str], names: Sequence[str], targets: Collection[str], dropped: Collection[str]
) -> dict[str, str]:
    """Return the modules to save and the tensor that asks for each; PEFT compares the ends of names, dots or not.

    A bias alone needs no saved module.
    """
    everything = {module_of(name) for name in names}
    holders = {".".join(parts[:end]) for parts in (m.split(".") for m in everything) for end in range(1, len(parts))}
    found = {module_of(name): name for name in saved if not name.endswith(".bias")}
    for module in sorted(everything | holders):
        entry = next((entry for entry in found if module.endswith(entry)), None)
        if entry is None:
            continue
        reason = f"{found[entry]!r} changed, and PEFT saves modules by the end of their names, here {entry!r}"
        if module in holders or not module:
            raise CompositionError(f"{reason}: {module!r} holds other modules, and cannot be saved whole; drop it")
        if module != entry and f"{module}.weight" in targets:
            raise CompositionError(f"{reason}: that means {module!r}, too, which is a target; save or drop one of them")
        found.setdefault(module, f"{module}.weight")
    both = [name for name in dropped if module_of(name) in found]
    if both:
        raise CompositionError(
            f"{listing(both)} cannot be left out: the rest of the module is saved; save or drop both"
        )
    return dict(sorted(found.items()))


def _left_out(twins: Twins, name: str) -> list[float | None]:
    """Return the norm of a tensor's change; nothing where there is none."""
    if name not in twins.before.checkpoint.tensors or name not in twins.after.checkpoint.tensors:
        return [None]
    old, new = twins.at(name)
    if not twins.are_floats(name) or old.entry.shape != new.entry.shape:
        return [] if twins.have_equal_bits(name) else [None]
    pair = twins.read(name)
    if pair is None:
        return []
    for side, tensor in zip((twins.before, twins.after), pair, strict=True):
        side.check_finite(name, tensor)
    size = math.sqrt(squares(difference(*pair, twins.space)).total)
    return [size] if size else []


def _check_entries(what: str, entries: Iterable[str], names: Iterable[str]) -> None:
    if isinstance(entries, str):
        raise CompositionError(f"{what} is {entries!r}; expected a list of module names")
    for entry in entries:
        if not any(_is_meant(name, (entry,)) for name in names):
            raise CompositionError(f"{what}: {entry!r} is the end of no module's or tensor's name")


def _check_same(twins: Twins, dropped: Collection[str]) -> None:
    """Both hold the same tensors, of the same shapes."""
    for side, other in ((twins.before, twins.after), (twins.after, twins.before)):
        only = [name for name, owner in twins.single.items() if owner is side and name not in dropped]
        if only:
            raise CompositionError(
                f"{listing(only)}: in {side.checkpoint.path} and not in {other.checkpoint.path}; compare checkpoints "
                "of one model, or drop what only one of them has"
            )
    for name in twins.shared:
        old, new = (tensor.entry.shape for tensor in twins.at(name))
        if old != new and name not in dropped:
            raise CompositionError(
                f"tensor {name!r} is {list(old)} in {twins.before.checkpoint.path} and {list(new)} in "
                f"{twins.after.checkpoint.path}; expected the same shape (resize the base first, or drop it)"
            )


def _check_saved(homeless: Sequence[str]) -> None:
    if homeless:
        raise CompositionError(
            f"{listing(homeless)} changed, and no LoRA can hold it; save 'auto' keeps all such tensors whole in the "
            "adapter, a list of module names keeps those, 'none' or drop leaves them out and says so"
        )
