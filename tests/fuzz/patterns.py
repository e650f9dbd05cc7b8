"""Strangers' patterns: a letter for what is asked, a pattern, a newline, a name; PEFT asks Python's ``re``."""

import json
import re
import warnings
from collections.abc import Callable
from typing import Any

from loraforge_registry.config import parse_config
from loraforge_registry.errors import ConfigError, KeyMismatchError
from loraforge_registry.header import TensorEntry
from loraforge_registry.layout import PREFIX, read_layout
from loraforge_registry.patterns import Matcher, PatternTable
from tests.fuzz.readers import refused

PATHS = ("model.layers.0.self_attn.q_proj", "model.layers.11.mlp.up_proj", "h.1.attn.c_attn", "q", "a.b", "lm_head")
MOST = (60, 12)  # characters of a pattern and a name: what may backtrack for long in Python's re is not compared
ENTRIES = tuple(
    TensorEntry(f"{PREFIX}{path}.lora_{letter}.weight", "F32", (2, 6) if letter == "A" else (4, 2), 0, 0)
    for path in PATHS
    for letter in "AB"
)


def pattern(data: bytes) -> str:
    text, _, name = data[1:].decode("utf-8", "ignore").partition("\n")
    # other characters have other classes in each version of Unicode, and re and regex know different ones
    name = "".join(character for character in name if " " <= character <= "~")[:24] or PATHS[len(text) % len(PATHS)]
    ask = {b"L": _layer, b"T": _entry, b"C": _layout}.get(data[:1], _match)
    try:
        return ask(text, name)
    except (ConfigError, KeyMismatchError) as error:
        return refused(error)


def _match(text: str, name: str) -> str:
    found = Matcher().full_match(text, name)
    assert not _is_small(text, name) or found == (_by_re(re.fullmatch, text, name) is not None), "re says otherwise"
    return f"a pattern, {'a' if found else 'no'} match"


def _layer(text: str, name: str) -> str:
    found = Matcher().layer_index(name, [text] if text else [])
    if _is_small(text, name):
        rule = rf"(?:^|.*?\.){text}\.(?P<idx>\d+)\." if text else r".*?\.[^.]*\.(?P<idx>\d+)\."
        match = _by_re(re.match, rule, name)
        assert found == (None if match is None or match["idx"] is None else int(match["idx"])), "re finds another layer"
    return f"a layer's pattern, {'no' if found is None else 'a'} layer"


def _entry(text: str, name: str) -> str:
    keys = list(dict.fromkeys(text.split(",")[:4]))
    table = PatternTable(dict(zip(keys, keys, strict=True)), Matcher())
    found = table.find(name, None)
    table.unmatched([name])
    if _is_small(text, name):
        theirs = (key for key in keys if _by_re(re.match, rf"(.*\.)?({key})$", name))
        assert found == next(theirs, None), "re finds another entry"
    return f"a table, {'no' if found is None else 'an'} entry"


def _layout(text: str, name: str) -> str:
    """A whole config whose patterns these are, with tensors that it may or may not account for."""
    fields = {"peft_type": "LORA", "r": 2, "target_modules": text, "exclude_modules": name, "rank_pattern": {name: 2}}
    entries = ENTRIES[: 2 + 2 * (len(text) % len(PATHS))]
    layout = read_layout(parse_config(json.dumps(fields).encode()), entries)
    assert 2 * len(layout.targets) == len(entries)
    return "a layout"


def _is_small(text: str, name: str) -> bool:
    return len(text) <= MOST[0] and len(name) <= MOST[1]


def _by_re(function: Callable[..., Any], *arguments: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*arguments)
