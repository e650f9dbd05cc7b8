"""How to load a node of a tree: lines to copy, each of which runs as it stands (``loading`` says what is in them)."""

import json
from collections.abc import Iterator, Sequence

from loraforge_registry.errors import ReferenceSyntaxError
from loraforge_registry.manifest import RECORD_FILE
from loraforge_registry.names import RefName
from loraforge_registry.repositories import CommitRecord
from loraforge_registry.server.forest import Tree
from loraforge_registry.server.loading import NEXT_LINE, Source, folder_of, from_here
from loraforge_registry.server.web import copyable, text
from loraforge_registry.serving import is_on_hub
from loraforge_registry.trees import steps_to


def tree_loading(source: Source, commit: CommitRecord, tree: Tree, node: str, local: str) -> str:
    """The part of a page that says how to load a node with all that it stands on.

    ``local`` is the tree's name on the server's machine, empty for one that was pushed over the wire.
    """
    return "<h2>Load it</h2>" + "".join(_parts(source, commit, tree, node, local))


def _parts(source: Source, commit: CommitRecord, tree: Tree, node: str, local: str) -> Iterator[str]:
    if source.needs_token:
        yield "<p class=quiet>For whoever has a token: set HF_TOKEN to it first.</p>"
    steps = steps_to(node)
    if len(steps) > 1:
        yield (
            f"<p class=quiet>The weights of <code>{text(node)}</code> are the base plus the adapters of all "
            f"{len(steps)} folders on its path: they work together, none alone.</p>"
        )
    if any(path.startswith(f"{node}/") for path in commit.files):
        yield f"<h3>In Python</h3>{copyable(_python(source, tree, steps))}"
    if "/" in source.id and RECORD_FILE in commit.files:  # what hf:// can name, and loraforge knows as a tree
        yield f"<h3>With loraforge</h3>{copyable(_pull(source, node))}"
        local = _local(source)
    elif local:
        there = [f"loraforge pull {local}", f"--node {node} --to ./{folder_of(source)}"]
        yield f"<h3>With loraforge, on the server's machine</h3>{copyable(NEXT_LINE.join(there))}"
    yield f"<h3>As one plain adapter, or merged</h3>{_after(tree, node, local)}"


def _python(source: Source, tree: Tree, steps: Sequence[str]) -> str:
    base = json.dumps(tree.record.base_name or "BASE", ensure_ascii=False)
    revision = f"    revision={json.dumps(source.revision)},\n" if source.revision else ""
    alone = len(steps) == 1
    patterns = f'"{steps[0]}/adapter_*"' if alone else '[f"{node}/adapter_*" for node in path]'
    lines = [
        "from huggingface_hub import snapshot_download\nfrom peft import PeftModel",
        "from transformers import AutoModelForCausalLM\n",
        *([] if alone else [f"path = {_list(steps)}"]),
        f"base = AutoModelForCausalLM.from_pretrained({base if len(base) < 20 else f'{chr(10)}    {base}{chr(10)}'})",
        f'folder = snapshot_download(\n    "{source.id}",\n{revision}    endpoint={json.dumps(source.endpoint)},',
        f"    allow_patterns={patterns},\n)",
    ]
    if alone:
        return "\n".join([*lines, f'model = PeftModel.from_pretrained(base, folder, subfolder="{steps[0]}")'])
    lines += [
        'model = PeftModel.from_pretrained(\n    base, folder, subfolder=path[0], adapter_name="0"\n)',
        "for number, node in enumerate(path[1:], start=1):",
        "    model.load_adapter(folder, str(number), subfolder=node)",
        "names = [str(number) for number in range(len(path))]",
        "model.base_model.set_adapter(names)",
    ]
    return "\n".join(lines)


def _list(steps: Sequence[str]) -> str:
    """A list in Python; a long one has a line for each."""
    said = json.dumps(steps)
    return said if len(said) < 56 else json.dumps(steps, indent=4)


def _pull(source: Source, node: str) -> str:
    at = f"@{source.revision}" if source.revision else ""
    pulled = [from_here(source), f"loraforge pull hf://{source.id}{at}", f"--as {_local(source)}"]
    return NEXT_LINE.join([*pulled, f"--node {node}"])


def _after(tree: Tree, node: str, local: str) -> str:
    """What a pulled tree is good for. The base has to be a directory: where the Hub has it, a line fetches it."""
    base = tree.record.base_name
    lines = [NEXT_LINE.join([f"loraforge tree flatten {local} {node}", f"--as {local.partition(':')[0]}-flat:v1"])]
    where = "./base" if is_on_hub(base) else "BASE"
    lines += [f"hf download {base} --local-dir ./base"] if is_on_hub(base) else []
    lines += [NEXT_LINE.join([f"loraforge tree merge {local} {node}", f"--base {where} --out ./merged"])]
    what = "" if is_on_hub(base) else "<p class=quiet>BASE is the directory of the base.</p>"
    return f"{copyable(chr(10).join(lines))}{what}"


def _local(source: Source) -> str:
    """A name in a store like that of the repository; ``tree`` where that is none."""
    name = folder_of(source).lower()
    try:
        return RefName(f"{name}-flat").name.removesuffix("-flat")
    except ReferenceSyntaxError:
        return "tree"
