"""PEFT's ways to name modules: suffix lists and regular expressions, matched without trusting them.

Patterns come from strangers' files. A plain dotted path is looked up among a name's suffixes; a regular expression,
whose backtracking nothing bounds in Python's ``re``, is matched by ``regex`` under a time limit, once ``re`` has agreed
that it is one (docs/adr/0003).
"""

import functools
import math
import re
import time
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from loraforge_registry.errors import ConfigError

MAX_PATTERN = 8192
MAX_SPELT_OUT = 200_000  # characters with every least repeat spelt out, as regex does when it compiles: some 80 MB
TIME_LIMIT = 1.0  # seconds for all matches of one config; honest patterns take a thousandth
ATTENTION = r"(?i)(.*\.)?[^.]*att(n|ention)[^.]*\..*"  # what "attention" means as a target

_REPEAT = re.compile(r"(?<!\\)(?:\\\\)*\{([0-9]+)")
_PLAIN = re.compile(r"[\w.\-]*")
# What re and regex read differently, and the way out. A brace can begin a fuzzy match, [: a POSIX class.
_DIFFERENT = (
    (re.compile(r"(?<!\\)(?:\\\\)*\{(?![0-9]*(?:,[0-9]*)?\})"), "write \\{ for a brace that is not a repeat"),
    (
        re.compile(r"(?<!\\)(?:\\\\)*\[:"),
        "write \\[ for a bracket before a colon",
    ),
)

V = TypeVar("V")


class Matcher:
    """Matches the patterns of one config; together they have one second.

    Raises (every method):
        ConfigError: not a regular expression, too long, or out of time.
    """

    def __init__(self) -> None:
        self._left = TIME_LIMIT
        self._compile = functools.cache(_compile)

    def check(self, pattern: str) -> None:
        """Refuse what is no regular expression on its own: it could close the group that it is put into."""
        self._compile(pattern)

    def full_match(self, pattern: str, name: str) -> bool:
        """Whether the regular expression ``pattern`` describes the whole of ``name``."""
        return self._run("fullmatch", pattern, name) is not None

    def layer_index(self, name: str, layers_patterns: Iterable[str]) -> int | None:
        """Return the layer number in ``name`` as PEFT finds it for layers_to_transform, or None."""
        patterns = list(layers_patterns)
        for pattern in patterns:
            self.check(pattern)
        rules = [rf"(?:^|.*?\.){p}\.(?P<idx>\d+)\." for p in patterns] or [r".*?\.[^.]*\.(?P<idx>\d+)\."]
        for rule in rules:
            match = self._run("match", rule, name)
            if match is not None:
                return None if match["idx"] is None else int(match["idx"])
        return None

    @contextmanager
    def spending(self, name: str) -> Iterator[None]:
        """Count the block's time against the limit."""
        start = time.thread_time()  # work, not waiting: a busy machine makes no honest pattern slow
        try:
            yield
        finally:
            self._left -= time.thread_time() - start
        if self._left <= 0:
            raise ConfigError(f"the config's patterns took too long to match against {name[:100]!r}")

    def _run(self, how: str, pattern: str, name: str) -> Any:  # noqa: ANN401 - as above
        compiled = self._compile(pattern)
        with self.spending(name):
            try:
                return getattr(compiled, how)(name, timeout=max(self._left, 1e-3))
            except TimeoutError as error:
                raise ConfigError(f"{pattern[:100]!r} took too long to match against {name[:100]!r}") from error
            except (RecursionError, MemoryError) as error:
                raise ConfigError(f"{pattern[:100]!r} is too large a regular expression") from error


def _compile(pattern: str) -> Any:  # noqa: ANN401 - regex has no types
    import regex  # noqa: PLC0415 - 15 ms, and most configs have no pattern

    if len(pattern) > MAX_PATTERN:
        raise ConfigError(f"a pattern of {len(pattern)} characters; the limit is {MAX_PATTERN}")
    # nested or not: repeats of repeats multiply
    repeats = math.prod(int(least.lstrip("0")[:9] or 1) for least in _REPEAT.findall(pattern))
    if len(pattern) * repeats > MAX_SPELT_OUT:
        raise ConfigError(f"{pattern[:100]!r} repeats too much: it stands for more than {MAX_SPELT_OUT} characters")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # re warns where a later syntax may mean something else
            re.compile(pattern)
        for different, instead in _DIFFERENT:
            if different.search(pattern):
                raise ConfigError(f"{pattern[:100]!r}: {instead}")
        return regex.compile(pattern)
    except (re.error, regex.error, FutureWarning, DeprecationWarning) as error:
        raise ConfigError(f"{pattern[:100]!r} is not a regular expression: {error}") from error
    except (RecursionError, MemoryError, OverflowError) as error:
        raise ConfigError(f"{pattern[:100]!r} is too large a regular expression") from error


class PatternTable(Generic[V]):
    r"""A rank_pattern or alpha_pattern: the first key that PEFT's rule ``(.*\.)?(key)$`` finds in a name decides.

    In a key that is a plain path each dot still means any one character. Such keys are looked up with the name's
    characters masked where the key has dots, one look-up for each way that keys of a length have their dots.
    """

    def __init__(self, patterns: Mapping[str, V], matcher: "Matcher") -> None:
        self._keys = list(patterns)
        self._values = list(patterns.values())
        self._matcher = matcher
        self._plain: dict[int, dict[tuple[int, ...], dict[str, int]]] = {}
        self._regular: list[tuple[int, str]] = []  # keys with their places
        for place, key in enumerate(patterns):
            if is_plain(key):
                dots = tuple(i for i, character in enumerate(key) if character == ".")
                self._plain.setdefault(len(key), {}).setdefault(dots, {})[key] = place
            else:
                self._regular.append((place, key))

    def find(self, name: str, default: V) -> V:
        """Return the value for ``name``."""
        first = min(self.plain_matches(name), default=len(self._values))
        for place, key in self._regular:
            if place > first:
                break
            if self._fits(key, name):
                return self._values[place]
        return self._values[first] if first < len(self._values) else default

    def unmatched(self, names: Collection[str]) -> list[str]:
        """Return the keys that match none of ``names``."""
        matched = {place for name in names for place in self.plain_matches(name)}
        matched |= {place for place, key in self._regular if any(self._fits(key, name) for name in names)}
        return [key for place, key in enumerate(self._keys) if place not in matched]

    def _fits(self, key: str, name: str) -> bool:
        self._matcher.check(key)
        return self._matcher.full_match(rf"(.*\.)?({key})", name)

    def plain_matches(self, name: str) -> Iterator[int]:
        """Yield the places of the plain keys that match."""
        with self._matcher.spending(name):
            for suffix in suffixes(name):
                for dots, keys in self._plain.get(len(suffix), {}).items():
                    place = keys.get(_masked(suffix, dots))
                    if place is not None:
                        yield place


def _masked(text: str, places: Iterable[int]) -> str:
    characters = list(text)
    for place in places:
        characters[place] = "."
    return "".join(characters)


def is_plain(pattern: str) -> bool:
    """Whether a pattern is only a dotted path."""
    return _PLAIN.fullmatch(pattern) is not None


def suffixes(name: str) -> Iterator[str]:
    """Yield a dotted path and all its shorter ends: ``a.b.c``, ``b.c``, ``c``."""
    yield name
    position = name.find(".")
    while position != -1:
        yield name[position + 1 :]
        position = name.find(".", position + 1)


def ends_with_path(name: str, suffix: str) -> bool:
    """Whether ``suffix`` is ``name``, or its last dotted components."""
    return name == suffix or name.endswith(f".{suffix}")
