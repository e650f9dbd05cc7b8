"""The lines of a tree's card, run by an unmodified PEFT: the adapters of a path, active together, are the node."""

import os
import re
import subprocess
import sys
import urllib.request

import pytest
import torch

import loraforge as lf
from loraforge.tree import reshape
from loraforge_registry.manifest import Artifact
from tests.hub import Server

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


def test_peft_runs_the_lines_of_the_card(tmp_path, run, monkeypatch):
    pytest.importorskip("peft")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(tmp_path / "base")
    monkeypatch.setenv("LORAFORGE_STORE", str(tmp_path / "store"))
    tree = lf.Tree.create(lf.Registry(tmp_path / "store"), "t", tmp_path / "base")
    for seed, path in enumerate(("french", "french/law", "french/law/contract", "german")):
        grown(tree, path, seed)
    tree.merge("french/law/contract", tmp_path / "merged")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with Server(tmp_path / "served") as server:
        token = server.add_user("me")
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", token)
        assert run("push", "t", "--to", "hf://me/Law-Tree").code == 0
        with urllib.request.urlopen(f"{server.url}/me/Law-Tree/resolve/main/README.md") as answer:  # noqa: S310 - ours
            card = answer.read().decode()
        lines = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
        assert 'path = ["french", "french/law", "french/law/contract"]' in lines
        environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        environment |= {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
        outputs = [tmp_path / f"{name}.pt" for name in ("card", "merged", "base")]
        command = [sys.executable, "-c", RUN, tmp_path / "base", lines, tmp_path / "merged", *outputs]
        done = subprocess.run(
            [*map(str, command)], env=environment, capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
    by_card, merged, base = (torch.load(path, weights_only=True) for path in outputs)
    assert (by_card - merged).abs().max() < 1e-4 * (merged - base).abs().max()
    assert "└─ contract" in card
    assert card.count("| graft |") == 4
