"""Which modules a configuration means, by PEFT's rules, and whether they can be adapted."""

import difflib
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from loraforge.errors import TargetError
from loraforge.layers.config import LoraConfig
from loraforge.layers.kinds import is_transposed, kind_of, why_not
from loraforge_registry.config import Settings
from loraforge_registry.layout import Targeted
from loraforge_registry.patterns import ATTENTION, Matcher, PatternTable, ends_with_path, suffixes

_LISTED = 8


def select(model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
    """Return the modules to adapt by name, sorted.

    Raises:
        TargetError: nothing matches (what comes near is listed), or an entry does, or a match cannot be adapted.
        ConfigError: a pattern that is no regular expression, or takes too long.
    """
    modules = dict(model.named_modules())
    modules.pop("", None)
    targeted = Targeted(_settings(config), Matcher())
    found = {name: module for name, module in modules.items() if _wants(targeted, config, model, name, module)}
    found = dict(sorted(found.items()))
    _check_entries(config, found, modules)
    for name, module in found.items():
        check_target(model, name, module)
    _check_one_layout(found)
    return found


def scales(config: LoraConfig, names: Iterable[str]) -> dict[str, tuple[int, float]]:
    """Return rank and alpha of each name.

    Raises:
        TargetError: a key of a pattern that matches none of them.
    """
    names, matcher = list(names), Matcher()
    ranks, alphas = PatternTable(config.rank_pattern, matcher), PatternTable(config.alpha_pattern, matcher)
    for what, table in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
        if unmatched := table.unmatched(names):
            raise TargetError(
                f"{what} {unmatched[0]!r} matches none of the {len(names)} targets{_near(unmatched, names)}"
            )
    found: dict[str, tuple[int, float]] = {}
    for name in names:
        rank = ranks.find(name, config.rank)
        default = 2.0 * rank if config.alpha is None else config.alpha
        found[name] = rank, float(alphas.find(name, default))
    return found


def saved_modules(model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
    """Return the modules that are trained whole.

    Raises:
        TargetError: an entry of modules_to_save that names no module with parameters.
    """
    found: dict[str, nn.Module] = {}
    names = [name for name, module in model.named_modules() if name and any(True for _ in module.parameters())]
    for entry in config.modules_to_save:
        matches = [name for name in names if ends_with_path(name, entry)]
        if not matches:
            raise TargetError(f"modules_to_save {entry!r} names no module with parameters{_near([entry], names)}")
        found |= {name: model.get_submodule(name) for name in matches}
    for name, module in found.items():
        for key, parameter in module.named_parameters():
            if twin := _twin(model, f"{name}.{key}", parameter):
                raise TargetError(
                    f"modules_to_save {name!r} shares {key!r} with {twin!r}: both would change, and the adapter "
                    "would hold one; untie them first"
                )
    return found


def check_target(model: nn.Module, name: str, module: nn.Module) -> None:
    """Refuse a module that cannot be adapted, or whose weight another one has too.

    Raises:
        TargetError: why not, and what would help.
    """
    reason = why_not(module)
    if reason is not None:
        raise TargetError(f"target {name!r} {reason}")
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
        raise TargetError(
            f"target {name!r} is read, not called, by the fast path of nn.TransformerEncoderLayer; call "
            "torch.backends.mha.set_fastpath_enabled(False) first"
        )
    if twin := _twin(model, f"{name}.weight", module.weight):
        raise TargetError(
            f"target {name!r} shares its weight with {twin!r}: merged, the update would reach both; exclude it, or "
            "untie them"
        )


def _twin(model: nn.Module, name: str, parameter: object) -> str | None:
    """Another name of a parameter."""
    every = model.named_parameters(remove_duplicate=False)
    return next((other for other, found in every if found is parameter and other != name), None)


def _wants(targeted: Targeted, config: LoraConfig, model: nn.Module, name: str, module: nn.Module) -> bool:
    ops = kind_of(module)
    kind = "" if ops is None else ops.name
    if config.targets in ("all-linear", "attention"):
        # the subclasses that cannot be adapted count too: leaving them out without a word would be a surprise
        kind = "linear" if kind == "linear" or isinstance(module, nn.Linear) else ""
        head = getattr(model, "get_output_embeddings", lambda: None)()
        return module is not head and targeted.includes(name, kind) and (kind == "linear")
    return targeted.includes(name, kind)


def _settings(config: LoraConfig) -> Settings:
    targets = config.targets
    if targets == "attention":
        targets = ATTENTION
    return Settings(
        target_modules=targets,
        exclude_modules=config.exclude,
        layers_to_transform=config.layers,
        modules_to_save=config.modules_to_save,
    )


def _check_entries(config: LoraConfig, found: Mapping[str, nn.Module], modules: Mapping[str, nn.Module]) -> None:
    adaptable = [name for name, module in modules.items() if kind_of(module) is not None]
    if not found:
        what = config.targets if isinstance(config.targets, str) else ", ".join(config.targets)
        wanted = [config.targets] if isinstance(config.targets, str) else config.targets
        where = f" in layers {config.layers}" if config.layers is not None else _near(wanted, adaptable)
        raise TargetError(f"targets {what!r} match no module{where}")
    if isinstance(config.targets, str) or config.exclude is not None or config.layers is not None:
        return
    ends = {suffix for name in found for suffix in suffixes(name)}
    for entry in config.targets:
        if entry not in ends:
            raise TargetError(f"targets: {entry!r} matches no module{_near([entry], adaptable)}")


def _check_one_layout(found: Mapping[str, nn.Module]) -> None:
    """PEFT's config says once for all targets whether their weights are transposed."""
    linear = {n: m for n, m in found.items() if (ops := kind_of(m)) is not None and ops.name == "linear"}
    transposed = [name for name, module in linear.items() if is_transposed(module)]
    if transposed and len(transposed) < len(linear):
        other = next(name for name in linear if name not in transposed)
        raise TargetError(f"target {transposed[0]!r} is a Conv1D and {other!r} a Linear: one adapter has one of them")


def _near(wanted: Iterable[str], names: Iterable[str]) -> str:
    """What may have been meant: module names like the wanted ones, or else what there is."""
    ends = sorted({name.rpartition(".")[2] for name in names if not name.rpartition(".")[2].isdigit()}) or sorted(names)
    close = sorted(
        {near for want in wanted for near in difflib.get_close_matches(want.rpartition(".")[2], ends, 3, 0.5)}
    )
    if close:
        return f"; did you mean {', '.join(map(repr, close))}?"
    more = f" and {len(ends) - _LISTED} more" if len(ends) > _LISTED else ""
    return f"; it has {', '.join(map(repr, ends[:_LISTED]))}{more}" if ends else "; it has no module of a known kind"
