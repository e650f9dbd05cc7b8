"""adapter_config.json: what it says that changes an adapter's function, read strictly and written canonically.

PEFT writes some forty keys and adds more with each release. Here each falls into one of four groups: modelled (the
dataclasses below), harmless (training, initialisation, labels), unsupported (refused when it is switched on), and
unknown (refused when it is switched on: it may change the function).
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from loraforge_registry import strict_json
from loraforge_registry.errors import ConfigError, FormatError
from loraforge_registry.strict_json import Json

MAX_BYTES = 1024 * 1024
MAX_PATTERNS = 100_000
MAX_SAVED = 1_000  # each is compared with each tensor
MAX_RANK = 1_000_000
MIN_ALPHA, MAX_ALPHA = 1e-12, 1e12

# Read only to be dropped: they steer training, loading or display, and none changes what a loaded adapter computes.
_HARMLESS = frozenset(
    {
        "auto_mapping",
        "corda_config",
        "enable_lora",
        "eva_config",
        "inference_mode",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "merge_weights",
        "peft_version",
        "qalora_group_size",
        "runtime_config",
    }
)
# Each makes the adapter something else than a sum of low-rank updates on named modules.
_UNSUPPORTED = frozenset(
    {
        "alora_invocation_tokens",
        "arrow_config",
        "kasa_config",
        "layer_replication",
        "megatron_config",
        "monteclora_config",
        "target_parameters",
        "use_bdlora",
        "use_qalora",
        "velora_config",
    }
)
# init_lora_weights values with which PEFT leaves the base alone, and those with which it rewrites it at loading.
_PLAIN_INIT = re.compile(r"gaussian|eva|orthogonal|mica")
_MUTATING_INIT = re.compile(r"pissa(_niter_[0-9]+)?|olora|corda|loftq|lora_ga")

BIAS_MODES = ("none", "all", "lora_only")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Settings:
    """What a config says beside ranks and scales: labels of the base, and which modules it means."""

    base_name: str | None = None
    base_revision: str | None = None
    task_type: str | None = None
    target_modules: tuple[str, ...] | str | None = None
    exclude_modules: tuple[str, ...] | str | None = None
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    token_indices: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Trained rows by embedding; the key ``""`` means the model's input embedding, whatever its name."""
    bias: str = "none"
    fan_in_fan_out: bool = False
    weight_tying: bool = False
    base_mutating_init: str | None = None


@dataclass(frozen=True, slots=True)
class Scaling:
    """Ranks and scales, by default and by pattern."""

    rank: int = 8
    alpha: float = 8
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False
    dora: bool = False
    lora_bias: bool = False


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """A whole adapter_config.json."""

    settings: Settings
    scaling: Scaling


def scale_of(alpha: float, rank: int, *, rslora: bool) -> float:
    """Return what multiplies ``B @ A``: ``alpha / r``, or ``alpha / sqrt(r)`` with rsLoRA (arXiv:2312.03732)."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def parse_config(data: bytes) -> AdapterConfig:
    """Read the bytes of an adapter_config.json.

    Raises:
        ConfigError: malformed, a wrong type or value (the field is named), or a setting that is not modelled.
    """
    try:
        fields = strict_json.loads(data, max_bytes=MAX_BYTES, max_depth=32)
    except FormatError as error:
        raise ConfigError(f"adapter_config.json: {error}") from error
    if not isinstance(fields, dict):
        raise ConfigError("adapter_config.json: not an object")
    peft_type = fields.pop("peft_type", None)
    if peft_type != "LORA":
        raise ConfigError(f"adapter_config.json: peft_type is {str(peft_type)[:40]!r}; only 'LORA' is supported")
    reader = _Fields(fields)
    config = AdapterConfig(_settings(reader), _scaling(reader))
    _refuse_unmodelled(reader.rest)
    return config


def encode_config(config: AdapterConfig) -> bytes:
    """Return canonical bytes: sorted keys and lists, and only what is not PEFT's default.

    Few keys is what travels best: PEFT before 0.14 stops at a key it does not know, later ones warn.
    """
    settings, scaling = config.settings, config.scaling
    fields: dict[str, object] = {
        "base_model_name_or_path": settings.base_name,
        "lora_alpha": _tidy(scaling.alpha),
        "peft_type": "LORA",
        "r": scaling.rank,
        "target_modules": _plain(settings.target_modules),
        "task_type": settings.task_type,
    }
    optional: dict[str, object] = {
        "alpha_pattern": {name: _tidy(alpha) for name, alpha in scaling.alpha_pattern.items()},
        "bias": "" if settings.bias == "none" else settings.bias,
        "ensure_weight_tying": settings.weight_tying,
        "exclude_modules": _plain(settings.exclude_modules),
        "fan_in_fan_out": settings.fan_in_fan_out,
        "init_lora_weights": settings.base_mutating_init,
        "layers_pattern": list(settings.layers_pattern),
        "layers_to_transform": None if settings.layers_to_transform is None else list(settings.layers_to_transform),
        "lora_bias": scaling.lora_bias,
        "modules_to_save": sorted(settings.modules_to_save),
        "rank_pattern": dict(scaling.rank_pattern),
        "revision": settings.base_revision,
        "trainable_token_indices": _tokens_out(settings.token_indices),
        "use_dora": scaling.dora,
        "use_rslora": scaling.rslora,
    }
    fields |= {key: value for key, value in optional.items() if value}
    return (json.dumps(fields, indent=2, sort_keys=True) + "\n").encode()


class _Fields:
    """The fields of a config, taken one by one; ``rest`` is what nobody asked for."""

    def __init__(self, fields: dict[str, Json]) -> None:
        self.rest = fields

    def take(self, key: str, kind: type[T], default: T) -> T:
        value = self.rest.pop(key, None)
        if value is None:
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise _wrong(key, value, kind.__name__)
        return value

    def text(self, key: str) -> str | None:
        return self.take(key, str, "") or None

    def names(self, key: str) -> tuple[str, ...]:
        return _names(key, self.rest.pop(key, None))

    def names_or_pattern(self, key: str) -> tuple[str, ...] | str | None:
        value = self.rest.pop(key, None)
        return value if isinstance(value, str) or value is None else _names(key, value)


def _settings(fields: _Fields) -> Settings:
    bias = fields.take("bias", str, "none")
    if bias not in BIAS_MODES:
        raise _wrong("bias", bias, "none, all or lora_only")
    layers_pattern = fields.names_or_pattern("layers_pattern") or ()
    return Settings(
        base_name=fields.text("base_model_name_or_path"),
        base_revision=fields.text("revision"),
        task_type=fields.text("task_type"),
        target_modules=fields.names_or_pattern("target_modules"),
        exclude_modules=fields.names_or_pattern("exclude_modules"),
        layers_to_transform=_layers(fields.rest.pop("layers_to_transform", None)),
        layers_pattern=(layers_pattern,) if isinstance(layers_pattern, str) else layers_pattern,
        modules_to_save=_few("modules_to_save", fields.names("modules_to_save")),
        token_indices=_token_indices(fields.rest.pop("trainable_token_indices", None)),
        bias=bias,
        fan_in_fan_out=fields.take("fan_in_fan_out", bool, False),  # noqa: FBT003 - a default, not a flag
        weight_tying=fields.take("ensure_weight_tying", bool, False),  # noqa: FBT003 - as above
        base_mutating_init=_init(fields.rest.pop("init_lora_weights", True)),
    )


def _scaling(fields: _Fields) -> Scaling:
    ranks = _pattern("rank_pattern", fields.rest.pop("rank_pattern", None))
    alphas = _pattern("alpha_pattern", fields.rest.pop("alpha_pattern", None))
    return Scaling(
        rank=_rank("r", fields.rest.pop("r", 8)),
        alpha=_alpha("lora_alpha", fields.rest.pop("lora_alpha", 8)),
        rank_pattern={key: _rank(f"rank_pattern[{key[:60]!r}]", value) for key, value in ranks.items()},
        alpha_pattern={key: _alpha(f"alpha_pattern[{key[:60]!r}]", value) for key, value in alphas.items()},
        rslora=fields.take("use_rslora", bool, False),  # noqa: FBT003 - a default, not a flag
        dora=fields.take("use_dora", bool, False),  # noqa: FBT003 - as above
        lora_bias=fields.take("lora_bias", bool, False),  # noqa: FBT003 - as above
    )


def _refuse_unmodelled(rest: Mapping[str, Json]) -> None:
    for key in sorted(rest):
        off = not rest[key] and rest[key] != {}  # an empty object switches a feature on in PEFT, with its defaults
        if key in _HARMLESS or off:
            continue
        what = "is not supported" if key in _UNSUPPORTED else "is not known to this version of loraforge"
        raise ConfigError(
            f"adapter_config.json: {key[:60]} = {json.dumps(rest[key])[:60]} {what}, and may change what the "
            "adapter computes"
        )


def _wrong(key: str, value: object, expected: str) -> ConfigError:
    return ConfigError(f"adapter_config.json: {key} is {str(value)[:60]!r}, expected {expected}")


def _alpha(key: str, value: Json) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not MIN_ALPHA <= abs(value) <= MAX_ALPHA:
        raise _wrong(key, value, f"a number of size {MIN_ALPHA:g} to {MAX_ALPHA:g}")
    return float(value)


def _rank(key: str, value: Json) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_RANK:
        raise _wrong(key, value, f"a whole number from 1 to {MAX_RANK}")
    return value


def _names(key: str, value: Json) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise _wrong(key, value, "a list of module names")
    names: list[str] = []
    for item in value:
        if not isinstance(item, str) or not item:
            raise _wrong(key, item, "a list of module names, none of them empty")
        names.append(item)
    return tuple(sorted(set(names)))


def _few(key: str, names: tuple[str, ...]) -> tuple[str, ...]:
    if len(names) > MAX_SAVED:
        raise _wrong(key, f"{len(names)} names, {names[0]!r} the first", f"at most {MAX_SAVED}")
    return names


def _layers(value: Json) -> tuple[int, ...] | None:
    if value is None or value == []:
        return None
    items = value if isinstance(value, list) else [value]
    layers: list[int] = []
    for item in items:
        if isinstance(item, bool) or not isinstance(item, int) or not 0 <= item < 2**31:
            raise _wrong("layers_to_transform", item, "layer numbers from 0")
        layers.append(item)
    return tuple(sorted(set(layers)))


def _token_indices(value: Json) -> dict[str, tuple[int, ...]]:
    if not value:
        return {}
    by_module = value if isinstance(value, dict) else {"": value}
    if isinstance(value, dict) and "" in value:  # it would be taken for the input embedding, which a list means
        raise _wrong("trainable_token_indices", "", "names of embeddings, or a list for the input embedding")
    _few("trainable_token_indices", tuple(by_module))
    found: dict[str, tuple[int, ...]] = {}
    for module, indices in by_module.items():
        if not isinstance(indices, list):
            raise _wrong("trainable_token_indices", indices, "a list of token numbers")
        rows: list[int] = []
        for index in indices:
            if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < 2**31:
                raise _wrong("trainable_token_indices", index, "token numbers from 0")
            rows.append(index)
        found[module] = tuple(rows)  # their order is the order of the rows
    return found


def _tokens_out(indices: Mapping[str, tuple[int, ...]]) -> object:
    if set(indices) == {""}:
        return list(indices[""])
    return {module: list(rows) for module, rows in sorted(indices.items())}


def _init(value: Json) -> str | None:
    """Return the initialisation where it rewrites the base; others leave no trace in a trained adapter."""
    if isinstance(value, bool) or (isinstance(value, str) and _PLAIN_INIT.fullmatch(value)):
        return None
    if not isinstance(value, str) or not _MUTATING_INIT.fullmatch(value):
        raise _wrong("init_lora_weights", value, "true, false or a name that PEFT knows")
    return value


def _pattern(key: str, value: Json) -> dict[str, Json]:
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > MAX_PATTERNS:
        raise _wrong(key, value, f"an object of at most {MAX_PATTERNS} patterns")
    return value


def _plain(names: tuple[str, ...] | str | None) -> object:
    return list(names) if isinstance(names, tuple) else names


def _tidy(number: float) -> float:
    """An int where the value is whole: PEFT declares lora_alpha as int."""
    return int(number) if float(number).is_integer() else number
