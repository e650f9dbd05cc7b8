"""The README.md of a repository that holds a tree: the tree drawn, a table of its nodes, and how to load one."""

from collections.abc import Iterator, Mapping

from loraforge_registry.canonical import Value
from loraforge_registry.digest import Digest
from loraforge_registry.manifest import Manifest
from loraforge_registry.remotes.card import code, for_base, front_matter
from loraforge_registry.serving import base_on_hub
from loraforge_registry.trees import TreeRecord, parent_path, steps_to


def tree_card(
    repo: str, digest: Digest, tree: TreeRecord, nodes: Mapping[str, Manifest], ranks: Mapping[str, str]
) -> bytes:
    """Return a model card; equal trees give equal cards. ``ranks`` are spelt, by path."""
    named = {base_on_hub(manifest) for manifest in nodes.values()}
    base = next(iter(named)) if len(named) == 1 else None
    body = [
        f"# {repo.partition('/')[2]}",
        "",
        f"A tree of LoRA adapters{for_base(base)}. Each folder is one adapter that PEFT loads; it was trained atop",
        "the base with all adapters above it merged in, and is for those weights only.",
        "",
        "```text",
        base or "the base",
        *_drawn(tree, "", ""),
        "```",
        "",
        *_table(tree, nodes, ranks),
        "",
        *_loading(repo, base, max(tree.nodes, key=lambda path: (path.count("/"), path), default="NODE")),
        f"The tree is `{digest}`, its base has tensors of the digest `{tree.base}`.",
    ]
    return (front_matter(base) + "\n" + "\n".join(body) + "\n").encode()


def _drawn(tree: TreeRecord, above: str, indent: str) -> Iterator[str]:
    children = [path for path in sorted(tree.nodes) if (parent_path(path) or "") == above]
    for path in children:
        last = path is children[-1]
        yield f"{indent}{'└─ ' if last else '├─ '}{path.rpartition('/')[2]}"
        yield from _drawn(tree, path, indent + ("   " if last else "│  "))


def _table(tree: TreeRecord, nodes: Mapping[str, Manifest], ranks: Mapping[str, str]) -> Iterator[str]:
    yield "| node | made by | rank | parameters | loss | artifact |"
    yield "|---|---|---|---|---|---|"
    for path, digest in sorted(tree.nodes.items()):
        manifest = nodes[path]
        made = manifest.derivation.operation if manifest.derivation else "import"
        yield (
            f"| `{path}` | {code(made)} | {ranks[path]} | {manifest.parameters:,} | {_loss(manifest.report or {})} "
            f"| `{digest}` |"
        )


def _loss(report: Mapping[str, Value]) -> str:
    loss = report.get("eval_loss", report.get("loss"))
    return f"{loss:.4g}" if isinstance(loss, float) else ""


def _loading(repo: str, base: str | None, example: str) -> Iterator[str]:
    name = base or "BASE"
    yield "## Loading"
    yield ""
    yield "A node is the base plus the updates of all adapters on its path, so all of them must be active:"
    yield ""
    yield "```python"
    yield "from peft import PeftModel"
    yield "from transformers import AutoModelForCausalLM"
    yield ""
    yield f"path = {steps_to(example)}".replace("'", '"')
    yield f'model = AutoModelForCausalLM.from_pretrained("{name}")'
    yield f'model = PeftModel.from_pretrained(model, "{repo}", subfolder=path[0], adapter_name="0")'
    yield "for number, node in enumerate(path[1:], start=1):"
    yield f'    model.load_adapter("{repo}", str(number), subfolder=node)'
    yield "model.base_model.set_adapter([str(number) for number in range(len(path))])"
    yield "```"
    yield ""
    yield "The last folder alone, without those above it, gives what nobody trained. As one plain adapter on the base, "
    yield "for vLLM for instance, or merged into it, rounded once:"
    yield ""
    yield "```console"
    yield f"$ loraforge pull hf://{repo} --as {_local(repo)}      # every byte checked; --node {example} for one path"
    yield f"$ loraforge tree flatten {_local(repo)} {example} --as flat:v1"
    yield f"$ loraforge tree merge {_local(repo)} {example} --base {name} --out ./merged"
    yield "```"
    yield ""


def _local(repo: str) -> str:
    return repo.partition("/")[2].lower()
