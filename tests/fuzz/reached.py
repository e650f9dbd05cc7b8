"""Which lines of a reader its seeds reach, and which inputs are worth keeping for it.

python -m tests.fuzz.reached DIRECTORY [TARGET ...]     keep what `torture --keep DIRECTORY` found
"""

import argparse
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType

from tests.fuzz import seeds
from tests.fuzz.targets import TARGETS, Target


def lines_of(module: str) -> dict[int, str]:
    """Every line of a module's functions, with the function that it is in."""
    source = Path(importlib.import_module(f"loraforge_registry.{module}").__file__ or "")
    return dict(_lines(compile(source.read_text(), str(source), "exec"), inside=False))


def _lines(code: CodeType, *, inside: bool) -> Iterator[tuple[int, str]]:
    inside = inside or bool(code.co_flags & 0x2)  # CO_NEWLOCALS: a function, not a module or class
    if inside:
        yield from ((line, code.co_qualname) for _, _, line in code.co_lines() if line and line != code.co_firstlineno)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _lines(constant, inside=inside)


@contextmanager
def watching(modules: tuple[str, ...]) -> Iterator[dict[str, set[tuple[int, int]]]]:
    """Note the lines that run in these modules, each with the one before it in its function."""
    files = {importlib.import_module(f"loraforge_registry.{module}").__file__: module for module in modules}
    seen: dict[str, set[tuple[int, int]]] = {module: set() for module in modules}

    def calls(frame: FrameType, _event: str, _argument: object) -> Callable[..., object] | None:
        module = files.get(frame.f_code.co_filename)
        if module is None:
            return None
        steps, last = seen[module], 0

        def each(frame: FrameType, event: str, _argument: object) -> Callable[..., object]:
            nonlocal last
            if event == "line":
                steps.add((last, frame.f_lineno))
                last = frame.f_lineno
            return each

        return each

    before = sys.gettrace()
    sys.settrace(calls)
    try:
        yield seen
    finally:
        sys.settrace(before)


def missed(modules: tuple[str, ...], act: Callable[[], object]) -> dict[str, dict[str, list[int]]]:
    """By module and function, the lines that did not run while something was done."""
    with watching(modules) as seen:
        act()
    found: dict[str, dict[str, list[int]]] = {}
    for module in modules:
        ran = {line for _, line in seen[module]}
        for line, function in sorted(lines_of(module).items()):
            if line not in ran:
                found.setdefault(module, {}).setdefault(function, []).append(line)
    return found


def worth_keeping(target: Target, inputs: set[bytes]) -> list[bytes]:
    """Of inputs, shortest first, those that take a step in the reader, or end, as none before them did."""
    kept, known = [], set[object]()
    for data in sorted(inputs, key=lambda data: (len(data), data)):
        with watching(target.modules) as seen:
            outcome = target.check(data)
        new = {outcome, *((module, step) for module, steps in seen.items() for step in steps)}
        if not new <= known:
            kept.append(data)
            known |= new
    return kept


def main() -> None:
    """Make the seeds of targets anew, from those that there are and a corpus."""
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("targets", nargs="*", default=[*TARGETS])
    options = parser.parse_args()
    for name in options.targets:
        found = {path.read_bytes() for path in (options.directory / name).iterdir()}
        seeds.write_seeds(name, worth_keeping(TARGETS[name], found | set(seeds.read_seeds(name))))


if __name__ == "__main__":
    main()
