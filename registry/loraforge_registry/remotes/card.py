"""The README.md of a repository: front matter that the Hub reads, and a card written from what is known."""

import json
import re
from collections.abc import Iterator

from loraforge_registry.config import AdapterConfig
from loraforge_registry.digest import Digest
from loraforge_registry.layout import Layout
from loraforge_registry.manifest import Artifact, Derivation, Manifest
from loraforge_registry.serving import base_on_hub, refused_by_vllm, vllm_command

_MODULES = 12  # named in the card; --json has all


def front_matter(base: str | None) -> str:
    """Return the block with which the Hub lists an adapter under its base."""
    lines = ["library_name: peft"]
    if base:
        lines += [f"base_model: {json.dumps(base)}", "base_model_relation: adapter"]
    tags = ["lora", *([f"base_model:adapter:{base}"] if base else [])]
    lines += ["tags:", *(f"- {json.dumps(tag)}" for tag in tags)]
    return "\n".join(["---", *lines, "---", ""])


def with_front_matter(readme: bytes, manifest: Manifest) -> bytes:
    """Return a person's README, with a block in front where it has none; their text stays as it is, to the byte."""
    if readme.startswith((b"---\n", b"---\r\n", b"\xef\xbb\xbf---")):
        return readme
    return front_matter(base_on_hub(manifest)).encode() + b"\n" + readme


def lacks_base(readme: bytes, manifest: Manifest) -> bool:
    """Whether a README's own front matter does not name the base, without which the Hub does not list it there."""
    head = re.match(rb"(?:\xef\xbb\xbf)?---\r?\n(.*?)\r?\n---", readme, re.DOTALL)
    return base_on_hub(manifest) is not None and (head is None or b"base_model:" not in head[1])


def card(repo: str, digest: Digest, manifest: Manifest, config: AdapterConfig, layout: Layout) -> bytes:
    """Return a model card; equal artifacts give equal cards."""
    body = [
        f"# {repo.partition('/')[2]}",
        "",
        f"A LoRA adapter{for_base(base_on_hub(manifest))}.",
        "",
        *_facts(digest, manifest, layout),
        "",
        *_loading(repo, manifest, config, layout),
        *_lineage(manifest.derivation),
    ]
    return (front_matter(base_on_hub(manifest)) + "\n" + "\n".join(body).rstrip() + "\n").encode()


def for_base(base: str | None) -> str:
    """Name the base, with a link, where the Hub has it."""
    return f" for [{base}](https://huggingface.co/{base})" if base else ""


def _facts(digest: Digest, manifest: Manifest, layout: Layout) -> Iterator[str]:
    ranks = sorted({target.rank for target in layout.targets.values()})
    modules = sorted({name.rpartition(".")[2] for name in layout.targets})
    shown = ", ".join(f"`{name}`" for name in modules[:_MODULES])
    more = f" and {len(modules) - _MODULES} more" if len(modules) > _MODULES else ""
    yield "| | |"
    yield "|---|---|"
    if manifest.base_revision and base_on_hub(manifest):
        yield f"| base revision | `{code(manifest.base_revision)}` |"
    yield f"| rank | {ranks[0]}{f' to {ranks[-1]}' if len(ranks) > 1 else ''} |"
    yield f"| targets | {len(layout.targets)}: {shown}{more} |"
    yield f"| parameters | {manifest.parameters:,} |"
    yield f"| artifact | `{digest}` |"
    yield f"| content | `{manifest.content_id}` |"


def _loading(repo: str, manifest: Manifest, config: AdapterConfig, layout: Layout) -> Iterator[str]:
    base = base_on_hub(manifest) or "BASE"
    yield "## Loading"
    yield ""
    yield "```python"
    yield "from peft import PeftModel"
    yield "from transformers import AutoModelForCausalLM"
    yield ""
    yield f'base = AutoModelForCausalLM.from_pretrained("{base}")'
    yield f'model = PeftModel.from_pretrained(base, "{repo}")'
    yield "```"
    yield ""
    yield "```console"
    if not any(refused_by_vllm(config, layout)):
        command = vllm_command(manifest, config, layout, name=repo.partition("/")[2], where=repo)
        yield f"$ {' '.join(command)}"
    yield f"$ loraforge pull hf://{repo}      # every byte checked against the digest above"
    yield "```"
    yield ""


def _lineage(derivation: Derivation | None) -> Iterator[str]:
    if derivation is None:
        return
    yield "## Lineage"
    yield ""
    yield f"Made by `{code(derivation.operation)}` from:"
    yield ""
    yield from _inputs(derivation, "")


def _inputs(derivation: Derivation, indent: str) -> Iterator[str]:
    for item in derivation.inputs:
        weight = f"{item.weight:g} x " if len(derivation.inputs) > 1 or item.weight != 1 else ""
        if isinstance(item.source, Derivation):
            yield f"{indent}- {weight}`{code(item.source.operation)}` of:"
            yield from _inputs(item.source, indent + "  ")
        elif isinstance(item.source, Artifact):
            yield f"{indent}- {weight}`{item.source.digest}`"
        else:
            yield f"{indent}- {weight}content `{item.source}`"


def code(text: str) -> str:
    """A text that a stranger may have written, between backticks: it stays there, on one line."""
    return "".join(c for c in text[:100] if c.isprintable() and c not in "`|<>")
