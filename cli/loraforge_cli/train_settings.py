"""What ``loraforge train`` is told: flags and a YAML file of the same names, of which flags win."""

import difflib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loraforge_cli.options import SOURCE
from loraforge_registry.errors import ConfigError, NotFoundError
from loraforge_registry.patterns import is_plain

if TYPE_CHECKING:
    from loraforge.training import TrainConfig


@dataclass(frozen=True)
class Flag:
    """One setting: its type, and what --help says. ``own`` ones are this command's, the rest TrainConfig's."""

    kind: Any
    help: str
    own: bool = False
    metavar: str | None = None


_SHARE = "steps, or below 1 a share of them"
FLAGS: Mapping[str, Flag] = {
    "base": Flag(str, "The base: a directory that transformers loads.", own=True, metavar="DIR"),
    "parent": Flag(SOURCE, "Train atop this adapter, merged into the base.", own=True, metavar="SOURCE"),
    "data": Flag(str, "JSON lines, or a directory of train.jsonl and valid.jsonl.", own=True, metavar="PATH"),
    "valid": Flag(str, "JSON lines to evaluate on.", own=True, metavar="FILE"),
    "val_split": Flag(float, "The share of the data to evaluate on.", own=True),
    "as": Flag(str, "What to call the adapter.", own=True, metavar="NAME[:TAG]"),
    "run": Flag(str, "Keep checkpoints and metrics here.", own=True, metavar="DIR"),
    "plot": Flag(str, "Draw loss, rate and gradient norm into this .png or .svg at the end.", own=True, metavar="FILE"),
    "tensorboard": Flag(str, "Write TensorBoard's files here, if it is installed.", own=True, metavar="DIR"),
    "rank": Flag(int, "The rank of the updates (8)."),
    "alpha": Flag(float, "alpha (twice the rank)."),
    "targets": Flag(str, "all-linear, attention, names with commas, or a regular expression.", metavar="WHICH"),
    "exclude": Flag(str, "Modules to leave out: names with commas, or a regular expression.", metavar="WHICH"),
    "modules_to_save": Flag(str, "Modules to train whole and store: names with commas.", metavar="WHICH"),
    "dropout": Flag(float, "Dropout before A (0)."),
    "rslora": Flag(bool, "Scale by alpha / sqrt(r)."),
    "dora": Flag(bool, "Train magnitudes, too (DoRA)."),
    "init": Flag(click.Choice(["kaiming", "gaussian", "pissa", "olora"]), "How the factors start (kaiming)."),
    "loraplus_ratio": Flag(float, "How much faster B learns (1)."),
    "epochs": Flag(int, "How often to go through the data (1)."),
    "max_steps": Flag(int, "How many steps, whatever the epochs."),
    "batch_size": Flag(int, "Samples, or packed lines, in a micro-batch (4).", own=True),
    "grad_accum": Flag(int, "Micro-batches in a step (1)."),
    "lr": Flag(float, "The learning rate (2e-4)."),
    "schedule": Flag(click.Choice(["constant", "linear", "cosine"]), "How the rate falls (linear)."),
    "warmup": Flag(float, f"How long it rises first: {_SHARE} (0)."),
    "weight_decay": Flag(float, "AdamW's decay (0)."),
    "max_grad_norm": Flag(float, "Clip the gradient to this norm; 0 does not (1)."),
    "max_length": Flag(int, "Cut samples to this many tokens (1024).", own=True),
    "pack": Flag(bool, "Put several samples in a line, isolated from each other.", own=True),
    "group_by_length": Flag(bool, "Put samples of like lengths in a batch, so that less is filled up.", own=True),
    "mask": Flag(
        click.Choice(["prompt", "last", "none"]), "Learn all answers, the last, or everything (prompt).", own=True
    ),
    "precision": Flag(click.Choice(["auto", "fp32", "bf16"]), "bf16 is autocast over float32 factors (auto)."),
    "device": Flag(str, "auto, cpu, cuda, cuda:N or mps (auto)."),
    "grad_checkpoint": Flag(bool, "Compute activations again to save memory."),
    "compile": Flag(bool, "Run the model through torch.compile (no dropout; needs a C++ compiler)."),
    "shard": Flag(bool, "Share the base out over the processes of torchrun (FSDP2)."),
    "eval_every": Flag(int, "Evaluate every so many steps (each epoch)."),
    "patience": Flag(int, "Stop after so many evaluations without a better one."),
    "save_every": Flag(int, "Checkpoint every so many steps (50)."),
    "keep": Flag(int, "How many checkpoints to keep (2)."),
    "seed": Flag(int, "Decides initial factors, dropout and order (0)."),
}
DEFAULTS: Mapping[str, Any] = {"batch_size": 4, "max_length": 1024, "pack": False, "mask": "prompt", "save_every": 50}


@dataclass(frozen=True)
class TrainSettings:
    """Everything that was said, checked."""

    base: str
    data: Path
    config: "TrainConfig"
    batch_size: int
    max_length: int
    pack: bool
    mask: Any
    group_by_length: bool = False
    name: str | None = None
    parent: str | None = None
    run: str | None = None
    plot: str | None = None
    tensorboard: str | None = None
    valid: Path | None = None
    val_split: float = 0.0
    said: Mapping[str, Any] = field(default_factory=dict)


def train_options(function: Callable[..., object], *, without: Collection[str] = ()) -> Callable[..., object]:
    """Give a command one option for each flag but some; what is not given is None."""
    for name, flag in reversed([item for item in FLAGS.items() if item[0] not in without]):
        spelt, parameter = "--" + name.replace("_", "-"), f"{name}_" if name == "as" else name
        if flag.kind is bool:
            option = click.option(f"{spelt}/--no-{spelt[2:]}", parameter, default=None, help=flag.help)
        else:
            option = click.option(spelt, parameter, type=flag.kind, default=None, help=flag.help, metavar=flag.metavar)
        function = option(function)
    return function


def read_settings(yaml_file: str | None, flags: Mapping[str, Any]) -> TrainSettings:
    """Join a YAML file and flags, and check them.

    Raises:
        ConfigError: a key that is none, or a value of a wrong type; it is named.
        TrainingError: a value out of range.
    """
    said = {**DEFAULTS, **(_read_yaml(Path(yaml_file)) if yaml_file else {}), **given_flags(flags)}
    return check_settings(said)


def given_flags(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flags that were given, by their settings' names."""
    return {name.removesuffix("_"): value for name, value in flags.items() if value is not None}


def check_settings(said: Mapping[str, Any]) -> TrainSettings:
    """Check settings that were converted, and fill in what follows from them.

    Raises:
        ConfigError: a value out of range.
        TrainingError: the same of one that is TrainConfig's.
    """
    from loraforge.training import TrainConfig

    for needed in ("base", "data"):
        if needed not in said:
            raise click.UsageError(f"say which {needed}: --{needed}, or {needed}: in the YAML file")
    for name in ("batch_size", "max_length"):
        if said[name] < 1:
            raise ConfigError(f"{name} is {said[name]}, expected a whole number from 1")
    if not 0 <= said.get("val_split", 0) < 1:
        raise ConfigError(f"val_split is {said['val_split']}, expected at least 0 and below 1")
    fields = {name: value for name, value in said.items() if not FLAGS[name].own}
    fields |= {name: targets(fields[name]) for name in ("targets", "exclude") if name in fields}
    if "modules_to_save" in fields:
        fields["modules_to_save"] = tuple(part.strip() for part in fields["modules_to_save"].split(","))
    return TrainSettings(
        base=said["base"],
        data=Path(said["data"]),
        config=TrainConfig(**fields, task_type="CAUSAL_LM"),
        batch_size=said["batch_size"],
        max_length=said["max_length"],
        pack=said["pack"],
        mask=said["mask"],
        group_by_length=said.get("group_by_length", False),
        name=said.get("as"),
        parent=said.get("parent"),
        run=said.get("run"),
        plot=said.get("plot"),
        tensorboard=said.get("tensorboard"),
        valid=Path(said["valid"]) if "valid" in said else None,
        val_split=said.get("val_split", 0.0),
        said=said,
    )


def targets(text: str) -> str | tuple[str, ...]:
    """Read module names with commas between them; what is not such a list is a regular expression."""
    names = tuple(part.strip() for part in text.split(","))
    if text in ("all-linear", "attention") or not all(name and is_plain(name) for name in names):
        return text
    return names


def _read_yaml(path: Path) -> dict[str, Any]:
    return converted(path, read_document(path))


def converted(path: Path, document: Mapping[object, object]) -> dict[str, Any]:
    """Return the settings of a YAML mapping, each of its flag's type.

    Raises:
        ConfigError: a key that is none, or a value of a wrong type; it is named.
    """
    return {_known(path, key): _converted(path, key, value) for key, value in document.items() if value is not None}


def read_document(path: Path) -> dict[object, object]:
    """Read a YAML file of settings.

    Raises:
        NotFoundError: there is none.
        ConfigError: it is not YAML, or not settings.
    """
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        _refuse_aliases_and_twins(path, text)
        document = yaml.safe_load(text)
    except FileNotFoundError as error:
        raise NotFoundError(f"{path}: there is no such file") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: is {type(document).__name__}, expected settings such as 'lr: 0.0002'")
    return document


def _refuse_aliases_and_twins(path: Path, text: str) -> None:
    """Refuse what YAML allows and nobody means: a few aliases are gigabytes when spelt out; the last of twins wins."""
    import yaml

    if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
        raise ConfigError(f"{path}: has an alias (*name); write the value itself")
    pending = [yaml.compose(text, yaml.SafeLoader)]
    while pending:
        node = pending.pop()
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        keys = [str(key.value) for key, _ in pairs]
        twice = next((key for number, key in enumerate(keys) if key in keys[:number]), None)
        if twice is not None:
            raise ConfigError(f"{path}: the setting {twice[:60]!r} stands twice")
        pending += [value for _, value in pairs]


def _known(path: Path, key: object) -> str:
    name = str(key).replace("-", "_")
    if name not in FLAGS:
        near = difflib.get_close_matches(name, FLAGS, 1)
        raise ConfigError(
            f"{path}: there is no setting {str(key)[:60]!r}{f'; did you mean {near[0]!r}?' if near else ''}"
        )
    return name


def _converted(path: Path, key: object, value: object) -> Any:  # noqa: ANN401 - of the flag's type
    """Read a YAML value as the flag's text would be: YAML takes 2e-4 for a text, and a list may be one of names."""
    kind = FLAGS[str(key).replace("-", "_")].kind
    if isinstance(value, list) and kind is str and not any(isinstance(item, list | dict) for item in value):
        return ",".join(map(str, value))
    if isinstance(value, list | dict):
        raise ConfigError(f"{path}: {key} is {type(value).__name__}, expected {_name_of(kind)}")
    if isinstance(value, bool) != (kind is bool):
        raise ConfigError(f"{path}: {key} is {value!r}, expected {_name_of(kind)}")
    if kind is int and isinstance(value, float):
        raise ConfigError(f"{path}: {key} is {value!r}, expected a whole number")
    try:
        return click.types.convert_type(kind).convert(value if kind is bool else str(value), None, None)
    except click.BadParameter:
        raise ConfigError(f"{path}: {key} is {str(value)[:60]!r}, expected {_name_of(kind)}") from None


def _name_of(kind: Any) -> str:  # noqa: ANN401 - a type, or one of click's
    if isinstance(kind, click.Choice):
        return "one of " + ", ".join(kind.choices)
    return {bool: "true or false", int: "a whole number", float: "a number"}.get(kind, "text")
