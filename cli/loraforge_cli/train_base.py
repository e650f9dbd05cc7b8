"""The base that an adapter is trained on: transformers' model and tokenizer, or bytes where it has none."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click
import torch

from loraforge.errors import FormatError, NotFoundError, TrainingError
from loraforge.training.data.formats import Message
from loraforge.training.data.tokens import Bytes, Segment, Tokenizer

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "spiece.model")


def load_model(base: str, precision: str, merged: Path | None = None) -> Any:  # noqa: ANN401 - transformers' models have no types here
    """Load a causal model from a directory: in float32 to compute in that, else in the type it is stored in.

    ``merged`` is where its files really lie, if something was merged into them; its name remains that of the base.

    Raises:
        NotFoundError: no model is there.
        FormatError: transformers cannot load it.
    """
    transformers = _transformers()
    path = merged or Path(base).expanduser()
    if not (path / "config.json").is_file():
        raise NotFoundError(f"{base}: no config.json there; expected a directory that transformers loads")
    half = precision == "bf16" or (precision == "auto" and torch.cuda.is_available())
    try:
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            str(path),
            dtype="auto" if half else torch.float32,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise FormatError(f"{base}: transformers cannot load it: {' '.join(str(error).split())[:300]}") from error
    if missing := sorted(found["missing_keys"]):  # transformers makes them up, at random
        raise FormatError(f"{base}: {len(missing)} weights of the model are not there, the first is {missing[0]!r}")
    model.name_or_path = model.config.name_or_path = str(Path(base).expanduser())
    model.config.use_cache = False
    return model


def load_tokenizer(base: str) -> Tokenizer:
    """Load the base's tokenizer, or bytes where the base has none."""
    path = Path(base).expanduser()
    if not any((path / name).exists() for name in _TOKENIZER_FILES):
        return Bytes()
    try:
        return FromBase(_transformers().AutoTokenizer.from_pretrained(str(path), local_files_only=True))
    except (OSError, ValueError, KeyError) as error:
        raise FormatError(f"{base}: its tokenizer cannot be loaded: {' '.join(str(error).split())[:300]}") from error


class FromBase:
    """A tokenizer of transformers as the data wants it: special tokens are added by us, and only once."""

    def __init__(self, tokenizer: Any) -> None:  # noqa: ANN401 - transformers' tokenizers have no types here
        self._tokenizer = tokenizer
        starts = tokenizer("x").input_ids[:1] == [tokenizer.bos_token_id] and tokenizer.bos_token_id is not None
        self.bos: int | None = tokenizer.bos_token_id if starts else None
        self.eos: int | None = tokenizer.eos_token_id
        padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.eos
        self.pad: int = 0 if padding is None else padding

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text; what a chat template spells out is recognised."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens, special ones too."""
        text: str = self._tokenizer.decode(list(ids))
        return text

    def chat(self, messages: Sequence[Message]) -> list[Segment]:
        """Write a chat by the base's template, and find the answers in it: what follows the prompt for one.

        Raises:
            TrainingError: there is no template, or it changes earlier turns when later ones follow.
        """
        if not getattr(self._tokenizer, "chat_template", None):
            raise TrainingError(
                "the base's tokenizer has no chat template; give prompt and completion instead of a chat"
            )
        found: list[Segment] = []
        before = ""
        for number, message in enumerate(messages):
            if message.role != "assistant":
                continue
            prompt = self._write(messages[:number], prompt=True)
            whole = self._write(messages[: number + 1], prompt=False)
            if not (prompt.startswith(before) and whole.startswith(prompt)):
                raise TrainingError(
                    "the base's chat template changes earlier turns when later ones follow, so answers cannot be told "
                    "from prompts; give prompt and completion instead of a chat"
                )
            found += [(prompt[len(before) :], False), (whole[len(prompt) :], True)]
            before = whole
        return found

    def _write(self, messages: Sequence[Message], *, prompt: bool) -> str:
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            text: str = self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt)
        except Exception as error:  # the template is a program of the base's author: it may raise anything
            raise TrainingError(
                f"the base's chat template refuses a chat: {' '.join(str(error).split())[:200]}"
            ) from error
        return text


def check_fits(model: Any, longest: int, highest: int, tokenizer: Tokenizer) -> None:  # noqa: ANN401 - as above
    """Refuse tokens and positions that the model has no row for.

    Raises:
        TrainingError: the highest token is beyond the embedding, or the longest row beyond the positions.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and longest > positions:
        raise TrainingError(
            f"the longest sample has {longest} tokens, the base {positions} positions: lower max-length"
        )
    rows = model.get_input_embeddings().num_embeddings
    if highest >= rows:
        what = "bytes, since the base has no tokenizer" if isinstance(tokenizer, Bytes) else "the base's tokenizer"
        raise TrainingError(f"the data has token {highest} (from {what}), the base knows {rows}: is this its data?")


def untrained(model: Any, ids: Iterable[int]) -> list[int]:  # noqa: ANN401 - as above
    """Return those of ``ids`` whose row of the frozen head was never trained: all zeros, or equal to another row."""
    head = model.get_output_embeddings()
    if head is None:
        return []
    w = head.weight.detach()
    found = []
    for number in sorted(set(ids)):
        twins = int((w[:, 0] == w[number, 0]).sum()) > 1 and int((w == w[number]).all(1).sum()) > 1
        if twins or not bool(w[number].any()):
            found.append(number)
    return found


def check_packs(model: Any, longest: int) -> None:  # noqa: ANN401 - as above
    """Refuse packing where a base's own mask is narrower than the one that keeps packed samples apart.

    Raises:
        TrainingError: a sample is longer than the base's sliding window.
    """
    window = getattr(model.config, "sliding_window", None)
    if window is not None and longest > window:
        raise TrainingError(
            f"the base looks {window} tokens back and the longest sample has {longest}: packed it would look further; "
            f"lower max-length to {window}, or leave --pack out"
        )


def _transformers() -> Any:  # noqa: ANN401 - a module without types
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise click.UsageError("loraforge train needs transformers: pip install 'loraforge[hf]'") from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers
