"""The seeds of each target: one a line, spelt so that a diff shows them. What was found wrong once stays."""

from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).parent / "seeds"
FOUND = Path(__file__).parent / "found.txt"  # a target's name, and behind a tab a seed


def spell(data: bytes) -> str:
    r"""Return bytes as ASCII on one line: what is printable as it is, the rest as ``\n`` or ``\xff``."""
    return data.decode("latin-1").encode("unicode_escape").decode("ascii")


def unspell(line: str) -> bytes:
    """Read what ``spell`` wrote."""
    return line.encode("ascii").decode("unicode_escape").encode("latin-1")


def read_seeds(name: str) -> list[bytes]:
    """Return a target's seeds."""
    found = [line.partition("\t")[2] for line in FOUND.read_text("ascii").splitlines() if line.startswith(f"{name}\t")]
    return [unspell(line) for line in [*found, *(HERE / f"{name}.txt").read_text("ascii").splitlines()]]


def write_seeds(name: str, found: Iterable[bytes]) -> None:
    """Keep seeds, each once, short ones first."""
    lines = [spell(data) for data in sorted(set(found), key=lambda data: (len(data), data))]
    (HERE / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines), "ascii")
