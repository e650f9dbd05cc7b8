"""PEFT's directory format, read as PEFT 0.14 to 0.21 write it and written so that all of them load it.

What is written is canonical: sorted keys, the metadata exactly ``{"format": "pt"}``, a config of only what is not a
default. Loading and saving keeps every bit of every tensor, and the content id.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TypeVar, cast

from loraforge.adapter import Adapter, Kind, LowRank, named_tensors, raw_bytes
from loraforge.adapter.mapped import map_tensors
from loraforge.adapter.tensors import dtype_name
from loraforge.errors import CompositionError, FormatError
from loraforge_registry.config import MAX_BYTES, AdapterConfig, Scaling, encode_config, parse_config
from loraforge_registry.export import write_directory
from loraforge_registry.header import Header, encode_header, parse_header, read_header
from loraforge_registry.ingest import Incoming, find_adapter, open_source, read_small
from loraforge_registry.layout import PREFIX, Target, read_layout
from loraforge_registry.manifest import CONFIG_FILE, WEIGHTS_FILE
from loraforge_registry.paths import AnyPath, expand
from loraforge_registry.patterns import Matcher, PatternTable, is_plain
from loraforge_registry.system import Buffer

T = TypeVar("T", int, float)


def load(source: AnyPath) -> Adapter:
    """Open a PEFT directory, or a safetensors file with its config beside it.

    Cost: reads the config and the header; tensors are mapped, and read when they are used.

    Raises:
        NotFoundError: no adapter is there.
        FormatError: config or tensors are refused; the message names the file, and the field or tensor.
    """
    path = expand(source)
    paths = find_adapter(path)
    with open_source(paths.weights) as fd:
        try:
            return read(fd, read_header(fd), read_small(paths.config, MAX_BYTES))
        except FormatError as error:
            raise type(error)(f"{path}: {error}") from error


def read(fd: int, header: Header, config: bytes) -> Adapter:
    """Make an adapter from an open weights file, its checked header and the bytes of its config."""
    parsed = parse_config(config)
    layout = read_layout(parsed, header.tensors)
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in map_tensors(fd, header).items()}

    def pair(target: Target) -> LowRank:
        parts = {role: tensors[key] for role, key in target.keys.items()}
        return LowRank(
            kind=cast("Kind", target.kind),
            a=parts["a"],
            b=parts["b"],
            alpha=target.alpha,
            rslora=target.rslora,
            bias=parts.get("b_bias"),
            magnitude=parts.get("magnitude"),
        )

    return Adapter(
        targets={name: pair(target) for name, target in layout.targets.items()},
        settings=layout.settings,
        extras={key: tensors[key] for key in layout.extras},
    )


def save(adapter: Adapter, target: AnyPath) -> None:
    """Write a directory that PEFT loads as it is; it appears complete or not at all.

    Raises:
        ConflictError: ``target`` exists and is not an empty directory.
        CompositionError: the adapter mixes what one PEFT config cannot say.
        InputOutputError: it cannot be written.
    """
    incoming = encode(adapter)
    contents: dict[str, Callable[[], Iterable[Buffer]]] = {
        CONFIG_FILE: lambda: [incoming.config],
        WEIGHTS_FILE: lambda: incoming.chunks,
    }
    write_directory(expand(target), contents)


def encode(adapter: Adapter) -> Incoming:
    """Return the canonical files of an adapter; the tensors are not copied.

    Raises:
        CompositionError: the adapter mixes what one PEFT config cannot say.
        FormatError: its tensors and settings do not account for each other.
    """
    tensors = {PREFIX + key: tensor for key, tensor in named_tensors(adapter).items()}
    start = encode_header((name, dtype_name(tensor), tuple(tensor.shape)) for name, tensor in tensors.items())
    size = len(start) + sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
    header = parse_header(start[8:], size)
    config = encode_config(config_of(adapter))
    read_layout(parse_config(config), header.tensors)  # what we write passes the gates that others' files pass

    def chunks() -> Iterable[Buffer]:
        yield start
        for entry in header.tensors:
            yield raw_bytes(tensors[entry.name])

    return Incoming(config, header, chunks())


def config_of(adapter: Adapter) -> AdapterConfig:
    """Return the configuration with which PEFT gives every target its rank and scale.

    Raises:
        CompositionError: rsLoRA or DoRA on some targets and not on others.
    """
    pairs = adapter.targets
    rank = _commonest(pair.rank for pair in pairs.values())
    alpha = _commonest(pair.alpha for pair in pairs.values())
    # PEFT before 0.15 finds one key for both patterns: a target in one of them must be in both
    odd = [name for name, pair in pairs.items() if pair.rank != rank or pair.alpha != alpha]
    keys = _pattern_keys(odd, list(pairs))
    ranks = {keys[name]: pairs[name].rank for name in odd}
    alphas = {keys[name]: pairs[name].alpha for name in odd}
    biased = any(pair.bias is not None for pair in pairs.values())
    scaling = Scaling(
        rank=rank,
        alpha=alpha,
        rank_pattern=ranks if set(ranks.values()) - {rank} else {},
        alpha_pattern=alphas if set(alphas.values()) - {alpha} else {},
        rslora=_same("rsLoRA", {pair.rslora for pair in pairs.values()}),
        dora=_same("DoRA", {pair.magnitude is not None for pair in pairs.values()}),
        lora_bias=biased,
    )
    return AdapterConfig(_with_targets(adapter).settings, scaling)


def _pattern_keys(names: Sequence[str], all_names: Sequence[str]) -> dict[str, str]:
    """Return for each name a key of rank_pattern and alpha_pattern that matches it and no other target.

    A plain path also matches every longer one that ends in it, and its dots match any character. Order cannot help,
    since PEFT sorts the keys when it saves again, so a path that would match another is anchored and escaped. (PEFT
    0.14 does not know anchors, and has no way to say this.)
    """
    table = PatternTable({name: place for place, name in enumerate(names)}, Matcher())
    ambiguous = {names[place] for other in all_names for place in table.plain_matches(other) if names[place] != other}
    return {name: name if is_plain(name) and name not in ambiguous else f"^{re.escape(name)}" for name in names}


def _with_targets(adapter: Adapter) -> Adapter:
    """Name every target in full where the adapter does not say which modules it means."""
    if adapter.settings.target_modules is not None:
        return adapter
    return replace(adapter, settings=replace(adapter.settings, target_modules=tuple(sorted(adapter.targets))))


def _commonest(values: Iterable[T]) -> T:
    """The value most targets have; the smallest of equals, so that the choice does not depend on order."""
    counts = Counter(values)
    return min(counts, key=lambda value: (-counts[value], value))


def _same(what: str, values: set[bool]) -> bool:
    if len(values) > 1:
        raise CompositionError(f"some targets have {what} and others have not; a PEFT config says one for all")
    return values == {True}
