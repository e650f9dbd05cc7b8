"""PEFT's ways to name modules: suffix lists and regular expressions, matched without trusting them.

A pattern comes from a stranger's file, and Python's ``re`` has no bound on backtracking. So a pattern that is only a
dotted path is compared as text, and every other one is matched by ``regex`` under a time limit.
"""

import re
from collections.abc import Iterable

from loraforge_registry.errors import ConfigError

MAX_PATTERN = 8192
TIME_LIMIT = 0.25  # seconds for one match; honest patterns on module paths take microseconds

_PLAIN = re.compile(r"[\w.\-]*")


def ends_with_path(name: str, suffix: str) -> bool:
    """Whether ``suffix`` is ``name``, or its last dotted components."""
    return name == suffix or name.endswith(f".{suffix}")


def matches_suffix_pattern(name: str, pattern: str) -> bool:
    r"""Whether PEFT's rule for a key of rank_pattern or alpha_pattern, ``(.*\.)?(key)$``, matches ``name``."""
    if _PLAIN.fullmatch(pattern):
        start = len(name) - len(pattern)
        if start < 0 or (start > 0 and name[start - 1] != "."):
            return False
        # in a regular expression an unescaped dot is any character
        return all(p in (".", c) for p, c in zip(pattern, name[start:], strict=True))
    return full_match(rf"(.*\.)?({pattern})", name)


def full_match(pattern: str, name: str) -> bool:
    """Whether the regular expression ``pattern`` describes the whole of ``name``.

    Raises:
        ConfigError: not a regular expression, longer than 8192, or matching takes longer than a quarter second.
    """
    return _run("fullmatch", pattern, name) is not None


def layer_index(name: str, layers_patterns: Iterable[str]) -> int | None:
    """Return the layer number in ``name`` as PEFT finds it for layers_to_transform, or None."""
    patterns = list(layers_patterns)
    rules = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in patterns] if patterns else [r".*?\.[^.]*\.(\d+)\."]
    for rule in rules:
        number = _run("match", rule, name)
        if number is not None:
            return int(number)
    return None


def _run(how: str, pattern: str, name: str) -> str | None:
    """Return the last group, or the whole match; None where nothing matches."""
    import regex  # noqa: PLC0415 - 15 ms, and most configs have no pattern

    if len(pattern) > MAX_PATTERN:
        raise ConfigError(f"a pattern of {len(pattern)} characters; the limit is {MAX_PATTERN}")
    try:
        compiled = regex.compile(pattern)
        match = getattr(compiled, how)(name, timeout=TIME_LIMIT)
    except regex.error as error:
        raise ConfigError(f"{pattern[:100]!r} is not a regular expression: {error}") from error
    except TimeoutError as error:
        raise ConfigError(f"{pattern[:100]!r} took too long to match against {name[:100]!r}") from error
    except (RecursionError, MemoryError, OverflowError) as error:
        raise ConfigError(f"{pattern[:100]!r} is too large a regular expression") from error
    if match is None:
        return None
    return str(match[match.re.groups])
