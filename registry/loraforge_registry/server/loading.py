"""How to load an adapter: lines to copy, each of which runs as it stands.

Strangers choose the name of a base, and people paste these lines: in Python it is a literal, in a shell only what
the Hub could call a model.
"""

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from loraforge_registry.config import AdapterConfig
from loraforge_registry.layout import Layout
from loraforge_registry.manifest import Manifest
from loraforge_registry.server.web import copyable, text
from loraforge_registry.serving import refused_by_vllm, vllm_command

NEXT_LINE = " \\\n  "  # a shell goes on there
# transformers' class for each of PEFT's kinds of task
_CLASSES = {
    "FEATURE_EXTRACTION": "AutoModel",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
}


@dataclass(frozen=True, slots=True)
class Source:
    """Where an adapter is: a repository on this server, at a revision, or at its head."""

    id: str
    endpoint: str
    revision: str | None = None
    needs_token: bool = False

    @property
    def short(self) -> str:
        """The revision for people; empty for the head."""
        found = self.revision or ""
        return found[:12] if len(found) == 40 else found


def loading(source: Source, manifest: Manifest, read: tuple[AdapterConfig, Layout] | None) -> str:
    """The part of a page that says how to load what is on it; ``read`` is None where its config is unreadable."""
    return "<h2>Load it</h2>" + "".join(_parts(source, manifest, read))


def _parts(source: Source, manifest: Manifest, read: tuple[AdapterConfig, Layout] | None) -> Iterator[str]:
    if source.needs_token:
        yield "<p class=quiet>For whoever has a token: set HF_TOKEN to it first.</p>"
    yield f"<h3>In Python</h3>{copyable(_python(source, manifest, read))}"
    if read is not None:
        yield f"<h3>With vLLM</h3>{_vllm(source, manifest, *read)}"
    if "/" in source.id:  # what hf:// can name
        yield f"<h3>With loraforge</h3>{copyable(_loraforge(source))}"


def _python(source: Source, manifest: Manifest, read: tuple[AdapterConfig, Layout] | None) -> str:
    # only the adapter is here: with HF_ENDPOINT the base would be looked for here, too
    base = json.dumps(manifest.base_name or "BASE", ensure_ascii=False)
    kind = _CLASSES.get((read[0].settings.task_type or "") if read else "", "AutoModelForCausalLM")
    revision = f"revision={json.dumps(source.revision)}, " if source.revision else ""
    return (
        "from huggingface_hub import snapshot_download\nfrom peft import PeftModel\n"
        f"from transformers import {kind}\n\n"
        f"base = {kind}.from_pretrained({base})\n"
        f'folder = snapshot_download("{source.id}", {revision}endpoint={json.dumps(source.endpoint)})\n'
        "model = PeftModel.from_pretrained(base, folder)"
    )


def _vllm(source: Source, manifest: Manifest, config: AdapterConfig, layout: Layout) -> str:
    refused = list(refused_by_vllm(config, layout))
    if refused:
        return f"<p>vLLM will not serve this adapter: {text('; '.join(refused)[:400])}.</p>"
    revision = [f"--revision {source.revision}"] if source.revision else []
    where = f"./{folder_of(source)}"
    fetched = [from_here(source), f"hf download {source.id}", *revision, f"--local-dir {where}"]
    served = vllm_command(manifest, config, layout, name=folder_of(source), where=where)
    return copyable("\n".join(map(NEXT_LINE.join, (fetched, served))))


def _loraforge(source: Source) -> str:
    at = f"@{source.revision}" if source.revision else ""
    return NEXT_LINE.join([from_here(source), f"loraforge pull hf://{source.id}{at}", f"--to ./{folder_of(source)}"])


def from_here(source: Source) -> str:
    """What a shell line begins with, so that the Hub's clients ask this server."""
    return f"HF_ENDPOINT={shlex.quote(source.endpoint)}"


def folder_of(source: Source) -> str:
    """The name of a folder for what is downloaded."""
    return source.id.rpartition("/")[2]
