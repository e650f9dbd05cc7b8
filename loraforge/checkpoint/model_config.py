"""What a checkpoint's config.json says that an adapter for it must know."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from loraforge.checkpoint.reader import Checkpoint, TensorAt
from loraforge.checkpoint.ties import OUTPUTS
from loraforge.errors import CompositionError, FormatError
from loraforge_registry import strict_json
from loraforge_registry.ingest import read_small
from loraforge_registry.strict_json import Json

_CONFIG = "config.json"
_MAX_CONFIG = 4 * 1024 * 1024
# models whose matrices are transformers' Conv1D, stored (in, out)
_CONV1D = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
_CAUSAL = ("ForCausalLM", "LMHeadModel")
_WITH_HEAD = (*_CAUSAL, "ForConditionalGeneration")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A model's name, PEFT's task for it, whether its embeddings are tied, and how it keeps its matrices.

    ``head`` is the module of the output embedding where the checkpoint does not store it; ``transposed`` is None where
    there is no config to tell.
    """

    name: str | None = None
    task_type: str | None = None
    tied: bool = False
    head: str | None = None
    transposed: bool | None = None


def read_config(checkpoint: Checkpoint) -> ModelConfig:
    """Read the config.json beside a checkpoint; without one nothing is known.

    Raises:
        FormatError: it is no JSON object.
    """
    if _CONFIG not in checkpoint.others:
        return ModelConfig()
    path = checkpoint.path / _CONFIG
    try:
        config = strict_json.loads(read_small(path, _MAX_CONFIG), max_bytes=_MAX_CONFIG, max_depth=64)
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from error
    if not isinstance(config, dict):
        raise FormatError(f"{path}: expected an object")
    architectures = config.get("architectures")
    names = [name for name in architectures if isinstance(name, str)] if isinstance(architectures, list) else []
    stored = any(name.rpartition(".")[0].rpartition(".")[2] in OUTPUTS for name in checkpoint.tensors)
    model_type = config.get("model_type")
    return ModelConfig(
        name=_text(config.get("_name_or_path")),
        task_type="CAUSAL_LM" if any(name.endswith(_CAUSAL) for name in names) else None,
        tied=(not names or any(name.endswith(_WITH_HEAD) for name in names)) and _is_tied(config, stored=stored),
        head=None if stored else ("embed_out" if model_type == "gpt_neox" else "lm_head"),
        transposed=isinstance(model_type, str) and model_type in _CONV1D,
    )


def stored_transposed(
    checkpoint: Checkpoint, targets: Iterable[str], config: ModelConfig, *, said: bool | None
) -> bool:
    """Whether the targets' weights lie (in, out): as the caller says, else the config, else the biases.

    Raises:
        CompositionError: a bias is as long as the side that would be the input.
    """
    evidence = dict(_by_biases(checkpoint.tensors, targets))
    expected = config.transposed if said is None else said
    if expected is None:
        expected = set(evidence.values()) == {True}
    for name, transposed in evidence.items():
        if transposed is not expected:
            raise CompositionError(
                f"tensor {name!r} is {list(checkpoint.tensors[name].entry.shape)}, and its bias says that it lies "
                f"{'(in, out)' if transposed else '(out, in)'}, the others' do not; say fan_in_fan_out="
                f"{transposed} and drop the others, or drop this one"
            )
    return expected


def _by_biases(tensors: Mapping[str, TensorAt], targets: Iterable[str]) -> Iterable[tuple[str, bool]]:
    """Yield the targets whose bias tells which side is the output, and whether that is the second."""
    for name in targets:
        bias = tensors.get(name.removesuffix(".weight") + ".bias")
        m, n = tensors[name].entry.shape
        if bias is not None and m != n and bias.entry.shape in ((m,), (n,)):
            yield name, bias.entry.shape == (n,)


def _is_tied(config: Mapping[str, Json], *, stored: bool) -> bool:
    """Whether a loader will tie the embeddings; transformers does where config.json does not say."""
    nested = config.get("text_config")
    said = config.get("tie_word_embeddings", nested.get("tie_word_embeddings") if isinstance(nested, dict) else None)
    return said is True if said is not None else not stored


def _text(value: Json) -> str | None:
    return value if isinstance(value, str) and value else None
