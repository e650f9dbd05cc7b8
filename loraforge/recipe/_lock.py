"""The lock beside a recipe: which artifact each input was, so that the same recipe means the same tomorrow."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loraforge.errors import LoraforgeError, RecipeError
from loraforge_registry.digest import Digest
from loraforge_registry.export import replace_file
from loraforge_registry.ingest import read_small
from loraforge_registry.strict_json import Json, loads

_MAX_BYTES = 4 * 1024 * 1024
_FORMAT = 1


@dataclass(frozen=True)
class Pin:
    """One input: what the recipe called it, the artifact that this was, and what that computes."""

    source: str
    digest: Digest
    content_id: Digest


def lock_path(recipe: Path) -> Path:
    """``blend.lock`` beside ``blend.yaml``."""
    return recipe.with_suffix(".lock")


def read_lock(path: Path) -> dict[str, Pin]:
    """Return the pins by input; none where there is no lock.

    Raises:
        RecipeError: it is not a lock that this version reads.
    """
    if not path.exists():
        return {}
    try:
        document = loads(read_small(path, _MAX_BYTES), max_bytes=_MAX_BYTES, max_depth=8)
        fields = _map(document, "lock", "inputs")
        if fields["lock"] != _FORMAT or isinstance(fields["lock"], bool):
            raise RecipeError(f"lock is {fields['lock']!r:.20}, this version reads {_FORMAT}")
        inputs = fields["inputs"]
        if not isinstance(inputs, dict):
            raise RecipeError("inputs is no map")
        return {name: _pin(value) for name, value in inputs.items()}
    except LoraforgeError as error:
        said = str(error).removeprefix(f"{path}: ")
        raise RecipeError(f"{path}: not a lock: {said}; remove it to pin the inputs anew") from error


def write_lock(path: Path, pins: Mapping[str, Pin]) -> None:
    """Write the pins, where they differ from what is there.

    Raises:
        InputOutputError: it cannot be written; the old lock stays.
    """
    inputs = {
        name: {"source": pin.source, "digest": str(pin.digest), "content_id": str(pin.content_id)}
        for name, pin in pins.items()
    }
    data = (json.dumps({"lock": _FORMAT, "inputs": inputs}, indent=2, sort_keys=True) + "\n").encode()
    if not path.exists() or path.read_bytes() != data:
        replace_file(path, data)


def _pin(value: Json) -> Pin:
    fields = _map(value, "source", "digest", "content_id")
    texts = {key: text for key, text in fields.items() if isinstance(text, str)}
    if len(texts) != len(fields):
        raise RecipeError("a field of an input that is no text")
    return Pin(texts["source"], _digest(texts["digest"]), _digest(texts["content_id"]))


def _digest(text: str) -> Digest:
    found = Digest.parse(text)
    if found.algorithm != "sha256":
        raise RecipeError(f"{text[:90]!r} is no sha256 digest")
    return found


def _map(value: Json, *keys: str) -> dict[str, Json]:
    if not isinstance(value, dict) or set(value) != set(keys):
        raise RecipeError(f"expected a map of exactly {', '.join(keys)}")
    return value
