"""JSON lines to samples: formats are known by their keys, one format a file.

    {"messages": [{"role", "content"}, ...]}                     chat
    {"conversations": [{"from", "value"}, ...]}                  ShareGPT's chat
    {"instruction", "output"[, "input"]}                         Alpaca
    {"prompt", "completion"} or {"input", "output"}              a question and its answer
    {"text"}                                                     plain text
    {"input_ids"[, "labels"]}                                    tokens, used as they are

Other keys are ignored. Every error names the file and the line.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraforge.errors import FormatError, NotFoundError

ROLES = ("system", "user", "assistant", "tool")
_SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_ALPACA = "{instruction}\n\n{input}\n\n"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Sample:
    """One line of data, in one of its three shapes: turns, text, or tokens with labels.

    A prompt and its completion are ``text`` with ``prompt`` before it.
    """

    messages: tuple[Message, ...] = ()
    prompt: str = ""
    text: str = ""
    input_ids: tuple[int, ...] = ()
    labels: tuple[int, ...] = ()


def read_samples(path: Path) -> list[Sample]:
    """Read a file of JSON lines; empty lines are passed over.

    Raises:
        NotFoundError: there is no such file.
        FormatError: a line that is no object, has none of the formats or another one than the first, or a value of a
            wrong type.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise NotFoundError(f"{path}: there is no such file") from error
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: not UTF-8 at byte {error.start}; expected lines of JSON") from error
    samples: list[Sample] = []
    first = ""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            name = _format_of(fields)
            if first and name != first:
                raise FormatError(
                    f"has the keys of {name!r}, lines before it those of {first!r}; use one format a file"
                )
            samples.append(_FORMATS[name](fields))
        except (FormatError, ValueError, RecursionError) as error:
            raise FormatError(f"{path}:{number}: {error}") from error
        first = name
    if not samples:
        raise FormatError(f"{path}: no line with a sample in it")
    return samples


def _format_of(fields: Any) -> str:  # noqa: ANN401 - any JSON
    if not isinstance(fields, dict):
        raise FormatError(f"is {type(fields).__name__}, expected an object")
    for name in _FORMATS:
        if all(key in fields for key in name.split("+")):
            return name
    raise FormatError(
        f"has the keys {', '.join(sorted(fields)[:8]) or '(none)'}; expected messages, conversations, instruction and "
        "output, prompt and completion, input and output, text, or input_ids"
    )


def _messages(fields: Mapping[str, Any]) -> Sample:
    return Sample(messages=_turns(fields, "messages", "role", "content", {role: role for role in ROLES}))


def _conversations(fields: Mapping[str, Any]) -> Sample:
    return Sample(messages=_turns(fields, "conversations", "from", "value", _SPEAKERS))


def _turns(fields: Mapping[str, Any], key: str, who: str, what: str, roles: Mapping[str, str]) -> tuple[Message, ...]:
    turns = fields[key]
    if not isinstance(turns, list) or not turns:
        raise FormatError(f"{key} is not a list of turns")
    found = []
    for turn in turns:
        if not isinstance(turn, dict) or turn.get(who) not in roles:
            said = turn.get(who) if isinstance(turn, dict) else turn
            raise FormatError(f"{key}: a turn's {who} is {str(said)[:40]!r}, expected one of {', '.join(roles)}")
        found.append(Message(roles[turn[who]], _text(turn, what)))
    if all(message.role != "assistant" for message in found):
        raise FormatError(f"{key} has no turn of the assistant, so there is nothing to learn")
    return tuple(found)


def _alpaca(fields: Mapping[str, Any]) -> Sample:
    given = _text(fields, "input") if fields.get("input") else ""
    instruction = _text(fields, "instruction")
    prompt = _ALPACA.format(instruction=instruction, input=given) if given else f"{instruction}\n\n"
    return Sample(prompt=prompt, text=_text(fields, "output"))


def _pair(prompt: str, completion: str) -> Callable[[Mapping[str, Any]], Sample]:
    return lambda fields: Sample(prompt=_text(fields, prompt), text=_text(fields, completion))


def _plain(fields: Mapping[str, Any]) -> Sample:
    return Sample(text=_text(fields, "text"))


def _tokens(fields: Mapping[str, Any]) -> Sample:
    ids = _integers(fields, "input_ids", 0)
    labels = _integers(fields, "labels", -100) if "labels" in fields else ids
    if len(labels) != len(ids) or not ids:
        raise FormatError(f"{len(ids)} input_ids and {len(labels)} labels; expected as many of both, at least one")
    return Sample(input_ids=ids, labels=labels)


def _text(fields: Mapping[str, Any], key: str) -> str:
    value = fields.get(key)
    if not isinstance(value, str):
        raise FormatError(f"{key} is {type(value).__name__}, expected text")
    return value


def _integers(fields: Mapping[str, Any], key: str, least: int) -> tuple[int, ...]:
    values = fields[key]
    if not isinstance(values, list) or not all(type(v) is int and least <= v < 2**31 for v in values):
        raise FormatError(f"{key} is not a list of whole numbers from {least}")
    return tuple(values)


_FORMATS: dict[str, Callable[[Mapping[str, Any]], Sample]] = {
    "messages": _messages,
    "conversations": _conversations,
    "instruction+output": _alpaca,
    "prompt+completion": _pair("prompt", "completion"),
    "input+output": _pair("input", "output"),
    "text": _plain,
    "input_ids": _tokens,
}
