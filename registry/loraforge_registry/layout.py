"""A config and a header read together: which tensor is what, and what the adapter computes.

PEFT's names on disk (0.14 to 0.21), behind the prefix ``base_model.model.``:

    Linear, Conv1D, Conv1d/2d/3d   <target>.lora_A.weight  <target>.lora_B.weight  [<target>.lora_B.bias]
    Embedding                      <target>.lora_embedding_A  <target>.lora_embedding_B
    DoRA                           <target>.lora_magnitude_vector
    trainable tokens               <embedding>.token_adapter.trainable_tokens_delta
    modules_to_save                <module>.<parameter>
    bias all or lora_only          <module>.bias, <target>.base_layer.bias, <target>.bias
    targeted embeddings            <target>.base_layer.weight: PEFT saves the base's own rows along

A tensor that fits none of these would overwrite a weight of the base when PEFT loads the file, so it is an error.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from loraforge_registry import canonical, patterns
from loraforge_registry.config import AdapterConfig, Scaling, Settings, scale_of
from loraforge_registry.digest import Digest
from loraforge_registry.errors import KeyMismatchError
from loraforge_registry.header import TensorEntry
from loraforge_registry.patterns import Matcher, PatternTable

PREFIX = "base_model.model."

# How each role's key ends; the first that fits decides.
SUFFIXES: Mapping[str, str] = {
    "a": ".lora_A.weight",
    "b": ".lora_B.weight",
    "b_bias": ".lora_B.bias",
    "embedding_a": ".lora_embedding_A",
    "embedding_b": ".lora_embedding_B",
    "magnitude": ".lora_magnitude_vector",
    "tokens": ".token_adapter.trainable_tokens_delta",
}
FACTOR_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})

# (dimensions of A, is an embedding): kind
_KINDS = {
    (2, False): "linear",
    (2, True): "embedding",
    (3, False): "conv1d",
    (4, False): "conv2d",
    (5, False): "conv3d",
}
# PEFT adds these to modules_to_save by task, whether or not the model has them.
_OPTIONAL_SAVED = frozenset({"classifier", "score", "qa_outputs"})
# Targets whose base weight PEFT writes along (EMBEDDING_LAYER_NAMES there).
_EMBEDDING_NAMES = ("embed_tokens", "lm_head")
# What PEFT leaves out of "all-linear": the model's output, whatever it is called.
OUTPUT_HEADS = ("lm_head", "embed_out", "output_layer", "score", "classifier")
LOADABLE_DTYPES = FACTOR_DTYPES | {"BOOL", "U8", "I8", "I16", "I32", "I64"}
_LISTED = 5  # how many keys an error names before it counts the rest


@dataclass(frozen=True, slots=True)
class Target:
    """One adapted module: the keys of its tensors, its rank and its scale.

    ``shape`` is that of the weight it adapts, transposed for Conv1D: Linear (out, in), Embedding (rows, dim),
    Conv (out, in, *kernel).
    """

    kind: str
    rank: int
    alpha: float
    rslora: bool
    shape: tuple[int, ...]
    groups: int
    keys: Mapping[str, str]

    @property
    def scale(self) -> float:
        """What multiplies ``B @ A``."""
        return scale_of(self.alpha, self.rank, rslora=self.rslora)


@dataclass(frozen=True, slots=True)
class Layout:
    """Every tensor of an adapter accounted for; keys are without ``base_model.model.``."""

    targets: Mapping[str, Target]
    extras: tuple[str, ...]
    settings: Settings


def read_layout(config: AdapterConfig, tensors: Iterable[TensorEntry]) -> Layout:
    """Account for every tensor by the config, and for everything the config announces by a tensor.

    Raises:
        KeyMismatchError: unexpected or missing keys (both are named), or shapes that disagree with each other
            or with the config.
    """
    entries = _strip_prefix(tensors)
    found, rest = _group(entries)
    if not found:
        raise KeyMismatchError("no LoRA tensors at all: expected keys such as '<target>.lora_A.weight'")
    matcher = Matcher()
    scales = _Scales(config.scaling, matcher)
    targets = {name: _target(name, keys, entries, scales) for name, keys in sorted(found.items())}
    targeted = Targeted(config.settings, matcher)
    extras, unexpected = _account_for_rest(rest, targets, config.settings)
    unexpected += [
        key
        for name, target in targets.items()
        if not targeted.includes(name, target.kind)
        for key in target.keys.values()
    ]
    if unexpected:
        raise KeyMismatchError(
            f"{_listing(unexpected)}: not accounted for by the config (loading it would overwrite the base's own "
            "weights, or silently do nothing); name the module in target_modules or modules_to_save, or take the "
            "tensor out"
        )
    _check_announced(config.settings, scales, targets, extras)
    _check_dtypes(entries, extras)
    _check_tokens(config.settings, extras, entries)
    return Layout(targets, tuple(sorted(extras)), config.settings)


def content_id(layout: Layout, tensors: Iterable[tuple[TensorEntry, Digest]]) -> Digest:
    """Return the digest of what the adapter computes, whoever wrote its files (SPEC.md section 4.1).

    ``tensors`` are those of the file, each with the BLAKE3 digest of its bytes.
    """
    rows = sorted((t.name.removeprefix(PREFIX), t.dtype, t.shape, digest.raw) for t, digest in tensors)
    document: canonical.Value = {
        "schema": "loraforge.content/1",
        "settings": _functional_settings(layout),
        "targets": [[name, t.kind, t.scale] for name, t in sorted(layout.targets.items())],
        "tensors": [[key, dtype, list(shape), raw] for key, dtype, shape, raw in rows],
    }
    return Digest.of(canonical.encode(document, max_bytes=None))  # never read back


def _functional_settings(layout: Layout) -> dict[str, canonical.Value]:
    settings = layout.settings
    found: dict[str, canonical.Value] = {}
    if settings.base_mutating_init:
        found["base_mutating_init"] = settings.base_mutating_init
    if settings.fan_in_fan_out:
        found["fan_in_fan_out"] = True
    tokens = {key.removesuffix(SUFFIXES["tokens"]): token_rows(key, settings) for key in layout.extras}
    if any(rows is not None for rows in tokens.values()):
        found["tokens"] = {module: list(rows) for module, rows in tokens.items() if rows is not None}
    if settings.weight_tying:
        found["weight_tying"] = True
    return found


def _strip_prefix(tensors: Iterable[TensorEntry]) -> dict[str, TensorEntry]:
    entries: dict[str, TensorEntry] = {}
    for entry in tensors:
        if not entry.name.startswith(PREFIX):
            raise KeyMismatchError(
                f"tensor {entry.name!r} does not begin with {PREFIX!r}, which PEFT gives every LoRA tensor "
                "(a kohya or diffusers file must be converted first)"
            )
        entries[entry.name[len(PREFIX) :]] = entry
    return entries


def _group(keys: Iterable[str]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Sort keys into {target: {role: key}} and those that belong to no pair of factors."""
    found: dict[str, dict[str, str]] = {}
    rest: list[str] = []
    for key in keys:
        role = next((role for role, suffix in SUFFIXES.items() if key.endswith(suffix)), None)
        if role is None or role == "tokens":
            rest.append(key)
        else:
            found.setdefault(key.removesuffix(SUFFIXES[role]), {})[role] = key
    return found, rest


class _Scales:
    """The ranks and alphas of a config, ready to be looked up."""

    def __init__(self, scaling: Scaling, matcher: Matcher) -> None:
        self.scaling = scaling
        self.ranks = PatternTable(scaling.rank_pattern, matcher)
        self.alphas = PatternTable(scaling.alpha_pattern, matcher)


def _target(name: str, keys: Mapping[str, str], entries: Mapping[str, TensorEntry], scales: _Scales) -> Target:
    scaling = scales.scaling
    embedding = "embedding_a" in keys or "embedding_b" in keys
    roles = ("embedding_a", "embedding_b") if embedding else ("a", "b")
    if embedding and scaling.lora_bias:
        raise KeyMismatchError(f"target {name!r} is an embedding: PEFT's lora_bias is not for those")
    expected = {*roles, *(["magnitude"] if scaling.dora else [])}
    expected |= {"b_bias"} if scaling.lora_bias and not embedding else set()
    missing = [name + SUFFIXES[role] for role in sorted(expected - set(keys))]
    surplus = [keys[role] for role in sorted(set(keys) - expected)]
    if missing or surplus:
        said = [f"{_listing(missing)} missing"] * bool(missing) + [f"{_listing(surplus)} unexpected"] * bool(surplus)
        raise KeyMismatchError(
            f"target {name!r}: {' and '.join(said)} (use_dora={str(scaling.dora).lower()}, "
            f"lora_bias={str(scaling.lora_bias).lower()})"
        )
    a, b = (entries[keys[role]] for role in roles)
    rank = scales.ranks.find(name, scaling.rank)
    alpha = scales.alphas.find(name, scaling.alpha)
    kind, shape, groups = _check_factors(name, a, b, rank, embedding=embedding)
    _check_side_shapes(name, keys, entries, rows=b.shape[0])
    renamed = {role.removeprefix("embedding_"): key for role, key in keys.items()}
    return Target(kind, rank, alpha, scaling.rslora, shape, groups, renamed)


def _check_factors(
    name: str, a: TensorEntry, b: TensorEntry, rank: int, *, embedding: bool
) -> tuple[str, tuple[int, ...], int]:
    """Return (kind, shape of the weight, convolution groups) of a pair whose shapes agree."""
    kind = _KINDS.get((len(a.shape), embedding), "")
    fits = kind != "" and len(b.shape) == len(a.shape) and set(b.shape[2:]) <= {1} and 0 not in a.shape + b.shape
    grouped = fits and kind.startswith("conv") and a.shape[0] % b.shape[1] == 0
    if not fits or not (a.shape[0] == b.shape[1] or grouped):
        raise KeyMismatchError(
            f"target {name!r}: A {list(a.shape)} and B {list(b.shape)} are not a pair (expected A (r, in) and "
            "B (out, r), or A (r, in, *kernel) and B (out, r, 1, ...) of a convolution)"
        )
    if a.shape[0] != rank:
        raise KeyMismatchError(f"target {name!r}: its tensors have rank {a.shape[0]}, the config says {rank}")
    for entry in (a, b):
        if entry.dtype not in FACTOR_DTYPES:
            raise KeyMismatchError(f"tensor {entry.name!r} is {entry.dtype}; expected F32, F16, BF16 or F64")
    shape = (a.shape[1], b.shape[0]) if embedding else (b.shape[0], *a.shape[1:])
    return kind, shape, a.shape[0] // b.shape[1]


def _check_side_shapes(name: str, keys: Mapping[str, str], entries: Mapping[str, TensorEntry], rows: int) -> None:
    """A bias or magnitude has one number for each output."""
    for role in ("b_bias", "magnitude"):
        if role in keys and entries[keys[role]].elements != rows:
            raise KeyMismatchError(f"tensor {keys[role]!r} has {entries[keys[role]].elements} numbers, expected {rows}")
        if role in keys and entries[keys[role]].dtype not in FACTOR_DTYPES:
            raise KeyMismatchError(f"tensor {keys[role]!r} is {entries[keys[role]].dtype}, expected a float type")
    if not name:
        raise KeyMismatchError("a LoRA pair without a target in front of its key")


class Targeted:
    """Which modules a config means: PEFT's check_target_module_exists."""

    def __init__(self, settings: Settings, matcher: Matcher) -> None:
        self._settings = settings
        self._matcher = matcher
        self._wanted = _NameSet(settings.target_modules, matcher)
        self._excluded = _NameSet(settings.exclude_modules, matcher)

    def includes(self, name: str, kind: str) -> bool:
        """Whether the module ``name``, of that kind, is one of them."""
        settings, last = self._settings, _last(name)
        if self._excluded.has(name) or any(self._is_saved_whole(name, entry) for entry in settings.modules_to_save):
            return False
        if settings.weight_tying and last in _EMBEDDING_NAMES and self._wanted.names_an_embedding():
            return True  # PEFT adapts the tied twin of a target as well
        if settings.target_modules == "all-linear":
            return kind == "linear" and last not in OUTPUT_HEADS
        if not self._wanted.has(name):
            return False
        if settings.layers_to_transform is None or self._wanted.has_exactly(name):
            return True
        return self._matcher.layer_index(name, settings.layers_pattern) in settings.layers_to_transform

    def _is_saved_whole(self, name: str, entry: str) -> bool:
        r"""PEFT leaves out what ``(^|.*\.)entry($|\..*)`` matches for an entry of modules_to_save."""
        if patterns.is_plain(entry) and "." not in entry:
            return f".{entry}." in f".{name}."
        return self._matcher.full_match(rf"(?:.*\.)?(?:{entry})(?:\..*)?", name)


class _NameSet:
    """Module names as a config gives them: the ends of paths, or one regular expression."""

    def __init__(self, names: tuple[str, ...] | str | None, matcher: Matcher) -> None:
        self._pattern = names if isinstance(names, str) else None
        self._ends = frozenset(() if names is None or isinstance(names, str) else names)
        self._matcher = matcher

    def has(self, name: str) -> bool:
        if self._pattern is not None:
            return self._matcher.full_match(self._pattern, name)
        return any(suffix in self._ends for suffix in patterns.suffixes(name))

    def names_an_embedding(self) -> bool:
        """Whether an entry means an input or output embedding, which may be tied to the other."""
        return any(_last(entry) in _EMBEDDING_NAMES for entry in self._ends)

    def has_exactly(self, name: str) -> bool:
        """Whether a path is named in full, or by the pattern: then layers_to_transform does not count."""
        return self._pattern is not None or name in self._ends


def _account_for_rest(
    keys: Iterable[str], targets: Mapping[str, Target], settings: Settings
) -> tuple[list[str], list[str]]:
    extras: list[str] = []
    unexpected: list[str] = []
    for key in keys:
        (extras if _is_accounted_for(key, targets, settings) else unexpected).append(key)
    return extras, unexpected


def _is_accounted_for(key: str, targets: Mapping[str, Target], settings: Settings) -> bool:
    if key.endswith(SUFFIXES["tokens"]):
        return token_rows(key, settings) is not None
    if any(_is_saved_by(key, entry) for entry in settings.modules_to_save):
        return True
    module, _, parameter = key.rpartition(".")
    owner = module.removesuffix(".base_layer")
    tied = settings.weight_tying and _last(module) in _EMBEDDING_NAMES
    if tied and any(_last(entry) in _EMBEDDING_NAMES for entry in settings.modules_to_save):
        return True
    if parameter == "bias":
        return settings.bias == "all" or (settings.bias == "lora_only" and owner in targets)
    is_base_weight = parameter == "weight" and owner != module and owner in targets
    return is_base_weight and _last(owner) in _EMBEDDING_NAMES


def _is_saved_by(key: str, entry: str) -> bool:
    """Whether an entry of modules_to_save covers the key: PEFT compares the ends of module names, dots or not."""
    position = key.find(".")
    while position != -1:
        if key[:position].endswith(entry):
            return True
        position = key.find(".", position + 1)
    return False


def token_rows(key: str, settings: Settings) -> tuple[int, ...] | None:
    """The token numbers of a tensor of trained rows; None for any other tensor."""
    if not key.endswith(SUFFIXES["tokens"]):
        return None
    module = key.removesuffix(SUFFIXES["tokens"])
    for entry, rows in settings.token_indices.items():
        tied = settings.weight_tying and {_last(module), _last(entry)} <= set(_EMBEDDING_NAMES)
        if not entry or tied or patterns.ends_with_path(module, entry):
            return rows
    return None


def _check_announced(settings: Settings, scales: _Scales, targets: Collection[str], extras: Collection[str]) -> None:
    """Everything the config announces has at least one tensor."""
    ends = {suffix for name in targets for suffix in patterns.suffixes(name)}
    wanted = settings.target_modules if isinstance(settings.target_modules, tuple) else ()
    if settings.exclude_modules is not None or settings.layers_to_transform is not None:
        wanted = ()  # either may leave an entry without a target
    missing = [f"target_modules {item!r}" for item in wanted if item not in ends]
    missing += [
        f"modules_to_save {item!r}"
        for item in settings.modules_to_save
        if item not in _OPTIONAL_SAVED and not any(_is_saved_by(key, item) for key in extras)
    ]
    missing += [
        f"trainable_token_indices {item!r}"
        for item in settings.token_indices
        if not any(key.endswith(item + SUFFIXES["tokens"]) for key in extras)
    ]
    missing += [f"rank_pattern {item!r}" for item in scales.ranks.unmatched(targets)]
    missing += [f"alpha_pattern {item!r}" for item in scales.alphas.unmatched(targets)]
    if missing:
        raise KeyMismatchError(f"{_listing(missing)}: announced by the config, but no tensor belongs to it")


def _check_tokens(settings: Settings, extras: Iterable[str], entries: Mapping[str, TensorEntry]) -> None:
    for key in extras:
        rows = token_rows(key, settings)
        if rows is not None and (len(entries[key].shape) != 2 or entries[key].shape[0] != len(rows)):
            raise KeyMismatchError(
                f"tensor {key!r} has shape {list(entries[key].shape)}, expected {len(rows)} rows as in "
                "trainable_token_indices"
            )


def _check_dtypes(entries: Mapping[str, TensorEntry], keys: Iterable[str]) -> None:
    for key in keys:
        if entries[key].dtype not in LOADABLE_DTYPES:
            raise KeyMismatchError(
                f"tensor {key!r} is {entries[key].dtype}; expected {', '.join(sorted(LOADABLE_DTYPES))}"
            )


def _last(path: str) -> str:
    """The last component of a dotted path."""
    return path.rpartition(".")[2]


def _listing(keys: list[str]) -> str:
    shown = ", ".join(repr(key) if "'" not in key else key for key in sorted(keys)[:_LISTED])
    return shown + (f" and {len(keys) - _LISTED} more" if len(keys) > _LISTED else "")
