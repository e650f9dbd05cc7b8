"""Several adapters in one YAML file: what all have, what each has, and every combination of a grid.

base: ./base                        any setting of ``loraforge train``: it counts for all
valid: unseen.jsonl
adapters:                           what each has of its own; without this, ``as`` names the only one
  french:v1: {data: french.jsonl}
  law:v1: {data: law.jsonl, rank: 16}
grid:                               each adapter in every combination
  lr: [1e-3, 3e-3]
halving: {first: 20, eta: 3}        after 20, 60, 180 ... steps the best third of a grid goes on
at_once: 8                          so many go through the base together
"""

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loraforge_cli.train_settings import DEFAULTS, TrainSettings, check_settings, converted, given_flags, read_document
from loraforge_registry.errors import ConfigError
from loraforge_registry.names import RefName

if TYPE_CHECKING:
    from loraforge.training import Halving

_OWN = frozenset({"adapters", "grid", "halving", "at_once"})
_OF_ALL = frozenset(
    {
        "as",
        "base",
        "parent",
        "run",
        "device",
        "precision",
        "grad_checkpoint",
        "compile",
        "shard",
        "save_every",
        "keep",
        "plot",
        "tensorboard",
    }
)
"""Settings that are of the model or of the whole run."""
_MOST = 1000


@dataclass(frozen=True)
class Entry:
    """One adapter to train: its name, whose grid it is of, its settings; ``own`` and ``grid`` set it apart."""

    name: RefName
    contest: RefName
    settings: TrainSettings
    own: Mapping[str, Any]
    grid: Mapping[str, Any]


@dataclass(frozen=True)
class Sweep:
    """All that a file means."""

    entries: tuple[Entry, ...]
    halving: "Halving | None"
    at_once: int | None
    run: str | None


def is_sweep(yaml_file: str) -> bool:
    """Whether a file means several adapters."""
    return any(key in _OWN for key in read_document(Path(yaml_file)))


def read_sweep(yaml_file: str, flags: Mapping[str, Any]) -> Sweep:
    """Read and check a file of several adapters; flags win, but for what is in the grid.

    Raises:
        ConfigError: a key that is none, or a value of a wrong type; it is named.
        TrainingError: a value out of range.
    """
    path, given = Path(yaml_file), given_flags(flags)
    document = read_document(path)
    own = {str(key): value for key, value in document.items() if key in _OWN and value is not None}
    common = {**converted(path, {k: v for k, v in document.items() if k not in _OWN}), **given}
    for name in ("plot", "tensorboard"):
        if name in common:
            raise click.UsageError(f"{path}: {name} shows one run, and these are several: leave it out")
    grid = _grid(path, own.get("grid", {}))
    for name in grid.keys() & given.keys():
        raise click.UsageError(f"{name} is in the grid of {path}: leave --{name.replace('_', '-')} out")
    entries: list[Entry] = []
    for contest, settings in _adapters(path, own, common).items():
        for combination in _combinations(path, grid):
            said = {**DEFAULTS, **common, **settings, **combination, **given}
            said.pop("as", None)
            apart = {key: value for key, value in settings.items() if key not in combination and key not in given}
            called = _named(path, contest, combination)
            entries.append(Entry(called, contest, check_settings(said), apart, combination))
    names = [entry.name for entry in entries]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(
            f"{path}: two adapters would be called {twice}; give the grid values that differ in their names"
        )
    return Sweep(tuple(entries), _halving(path, own.get("halving")), _at_once(path, own), common.get("run"))


def _adapters(path: Path, own: Mapping[str, Any], common: Mapping[str, Any]) -> dict[RefName, dict[str, Any]]:
    said = own.get("adapters")
    if said is None:
        if "as" not in common:
            raise click.UsageError(f"{path}: say what to call the adapters: as: NAME[:TAG], --as, or 'adapters'")
        return {RefName.parse(common["as"]): {}}
    if "as" in common:
        raise ConfigError(f"{path}: 'adapters' names the adapters; leave 'as' out")
    said = _mapping(path, "adapters", said)
    found: dict[RefName, dict[str, Any]] = {}
    for key, settings in said.items():
        name = RefName.parse(str(key))
        if name in found:
            raise ConfigError(f"{path}: the adapter {name} stands twice")
        found[name] = converted(path, {} if settings is None else _mapping(path, str(key), settings))
        _check_own(path, str(key), found[name])
    return found


def _grid(path: Path, said: object) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for key, values in _mapping(path, "grid", said).items() if said else ():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{path}: grid: {str(key)[:60]} is {values!r}, expected a list of values")
        each = [converted(path, {key: value}) for value in values]
        if not all(each):
            raise ConfigError(f"{path}: grid: {str(key)[:60]} has an empty value")
        for one in each:
            _check_own(path, "grid", one)
            found.setdefault(next(iter(one)), []).append(next(iter(one.values())))
    return found


def _combinations(path: Path, grid: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    total = 1
    for values in grid.values():
        total *= len(values)
    if total > _MOST:
        raise ConfigError(f"{path}: the grid has {total} combinations, expected at most {_MOST}")
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def _named(path: Path, name: RefName, combination: Mapping[str, Any]) -> RefName:
    """A grid's adapters have tags that say what sets them apart: french:v1-lr0.001-rank4."""
    parts = [f"{key}{_text(value)}" for key, value in combination.items()]
    tag = "-".join([name.tag, *parts])
    if len(tag) > 128:
        raise ConfigError(f"{path}: the tag {tag[:60]}... is longer than 128; give the grid fewer or shorter values")
    return RefName(name.name, tag)


def _text(value: object) -> str:
    """What of a value may stand in a tag; of a file its name."""
    text = f"{value:g}" if isinstance(value, float) else Path(str(value)).name.removesuffix(".jsonl").lower()
    return re.sub(r"[^a-z0-9]+$", "", re.sub(r"[^a-z0-9.]+", "-", text).replace("..", "."))


def _halving(path: Path, said: object) -> "Halving | None":
    from loraforge.training import Halving

    if said is None:
        return None
    given: dict[Any, Any] = _mapping(path, "halving", said)
    unknown = next((key for key in given if key not in ("first", "eta")), None)
    if unknown is not None or "first" not in given:
        what = "no 'first'" if unknown is None else f"a key {str(unknown)[:60]!r}"
        raise ConfigError(f"{path}: halving has {what}, expected 'first' (steps) and, if not 3, 'eta'")
    return Halving(**given)


def _at_once(path: Path, own: Mapping[str, Any]) -> int | None:
    value = own.get("at_once")
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{path}: at_once is {value!r}, expected a whole number from 1")
    return value


def _mapping(path: Path, key: str, value: object) -> dict[object, object]:
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: {key[:60]} is {type(value).__name__}, expected settings such as 'lr: 0.0002'")
    return value


def _check_own(path: Path, where: str, settings: Mapping[str, Any]) -> None:
    for key in sorted(settings.keys() & _OF_ALL):
        raise ConfigError(f"{path}: {where[:60]}: {key} is of all adapters; give it once, beside 'adapters' and 'grid'")
