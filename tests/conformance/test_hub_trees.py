"""The lines of a tree's card, run by an unmodified PEFT: the adapters of a path, active together, are the node."""

import os
import re
import subprocess
import sys
import urllib.request
from html import unescape

import pytest
import torch

import loraforge as lf
from loraforge.tree import reshape
from loraforge_registry.manifest import Artifact
from tests.hub import ROOT, Server

RUN = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

tokens = torch.arange(16).reshape(1, 16)
exec(sys.argv[2].replace('"BASE"', repr(sys.argv[1])))
with torch.no_grad():
    torch.save(model.eval()(tokens).logits, sys.argv[4])
    merged = AutoModelForCausalLM.from_pretrained(sys.argv[3]).eval()
    torch.save(merged(tokens).logits, sys.argv[5])
    torch.save(AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()(tokens).logits, sys.argv[6])
"""


def grown(tree, path, seed):
    from dataclasses import replace

    from loraforge.adapter import Adapter, LowRank

    generator = torch.Generator().manual_seed(seed)
    shapes = {"q_proj": (32, 32), "v_proj": (16, 32)}
    pairs = {
        f"model.layers.{layer}.self_attn.{name}": LowRank(
            "linear",
            torch.randn(4, columns, generator=generator),
            torch.randn(rows, 4, generator=generator) * 0.05,
            alpha=8.0,
        )
        for layer in range(2)
        for name, (rows, columns) in shapes.items()
    }
    adapter = Adapter(pairs)
    settings = replace(adapter.settings, base_name=None)
    digest = tree.registry.push(replace(adapter, settings=settings))
    reshape.graft(tree, path, Artifact(digest, tree.registry.store.manifest(digest).content_id))


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A tree on a small Llama, the directory of that, and one for each of two nodes, with its path merged in."""
    pytest.importorskip("peft")
    from transformers import LlamaConfig, LlamaForCausalLM

    home = tmp_path_factory.mktemp("planted")
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(home / "base")
    tree = lf.Tree.create(lf.Registry(home / "store"), "t", home / "base")
    for seed, path in enumerate(("french", "french/law", "french/law/contract", "german")):
        grown(tree, path, seed)
    for path in ("french/law/contract", "german"):
        tree.merge(path, home / "merged" / path)
    return home


@pytest.fixture
def server(planted, run, monkeypatch):
    """A server over the store that has the tree, to which it was pushed, too."""
    monkeypatch.setenv("LORAFORGE_STORE", str(planted / "store"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with Server(planted / "store") as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", server.add_user("me"))
        assert run("push", "t", "--to", "hf://me/Law-Tree").code == 0
        yield server


def read(server, path):
    with urllib.request.urlopen(server.url + path) as answer:  # noqa: S310 - our own
        return answer.read().decode()


def check_python(server, planted, tmp_path, lines, node):
    """What lines of Python make of a node gives the logits of the checkpoint with its path merged in."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    outputs = [tmp_path / f"{name}.pt" for name in ("lines", "merged", "base")]
    command = [sys.executable, "-c", RUN, planted / "base", lines, planted / "merged" / node, *outputs]
    done = subprocess.run(
        [*map(str, command)], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    by_lines, merged, base = (torch.load(path, weights_only=True) for path in outputs)
    assert (by_lines - merged).abs().max() < 1e-4 * (merged - base).abs().max()


def test_peft_runs_the_lines_of_the_card(server, planted, tmp_path):
    card = read(server, "/me/Law-Tree/resolve/main/README.md")
    lines = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    assert 'path = ["french", "french/law", "french/law/contract"]' in lines
    check_python(server, planted, tmp_path, lines, "french/law/contract")
    assert "└─ contract" in card
    assert card.count("| graft |") == 4


def blocks(server, path):
    """What a page offers to copy, but for the digests."""
    found = re.findall(r"<pre data-copy>(.*?)</pre>", read(server, path), re.DOTALL)
    return [unescape(block) for block in found if not unescape(block).startswith(("tree ", "artifact "))]


@pytest.mark.parametrize(
    ("where", "node"), [("/me/Law-Tree", "french/law/contract"), ("/t/tree/main/german", "german")]
)
def test_every_line_that_a_page_offers_runs(where, node, server, planted, tmp_path):
    """As they stand: in a shell of a machine that has none of it, or on the server's own, where the page says so."""
    python, pull, after = blocks(server, where)
    check_python(server, planted, tmp_path, python, node)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "loraforge").write_text(f'#!/bin/sh\nexec {sys.executable} -m loraforge_cli "$@"\n')
    (tmp_path / "bin" / "loraforge").chmod(0o755)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "HF_HOME": str(tmp_path / "home")}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "registry", ROOT / "cli")))
    if where.startswith("/me/"):
        environment["LORAFORGE_STORE"] = str(tmp_path / "elsewhere")
    script = f"set -e\nBASE={planted / 'base'}\n{pull}\n{after.replace('BASE', '$BASE')}\nloraforge verify ./merged\n"
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for file in sorted((planted / "merged" / node).glob("*.safetensors")):
        assert (tmp_path / "merged" / file.name).read_bytes() == file.read_bytes()
    if not where.startswith("/me/"):
        assert (tmp_path / "t" / node / "adapter_config.json").exists()
