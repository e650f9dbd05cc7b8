"""PEFT pushes to our server and loads from it, and the model answers the same to the last bit."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.hub import Server

CLIENT = """
import sys, warnings
import torch
from peft import AutoPeftModel, LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

base, out, *repos = sys.argv[1:]
torch.manual_seed(0)
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                     num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32)
tokens = torch.arange(16).reshape(1, 16)
for repo in repos:
    repo, _, revision = repo.partition("@")
    if revision == "push":
        LlamaForCausalLM(config).save_pretrained(base)
        lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora)
        model.push_to_hub(repo, commit_message="from PEFT")
    else:
        named = {"revision": revision} if revision else {}
        assert PeftConfig.from_pretrained(repo, **named).r == 4
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), repo, **named)
    with torch.no_grad():
        torch.save(model.eval()(tokens).logits, f"{out}/{repo.replace('/', '-')}-{revision}.pt")
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with Server(tmp_path_factory.mktemp("hub") / "store") as server:
        yield server


def peft(server, token, home, *arguments):
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment = {**inherited, "HF_ENDPOINT": server.url, "HF_HOME": str(home), "OMP_NUM_THREADS": "1"}
    environment |= {"HF_TOKEN": token} if token else {}
    command = [sys.executable, "-c", CLIENT, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:] + server.log.read_text()[-3000:]


@pytest.fixture(scope="module")
def pushed(server, tmp_path_factory):
    """Where PEFT made a base, and left the logits of what it pushed."""
    folder = tmp_path_factory.mktemp("pushed")
    peft(server, server.add_user("me"), folder / "home", folder / "base", folder, "me/french-LoRA@push")
    return folder


def test_pushed_by_peft_stored_pulled_and_loaded_with_equal_logits(server, pushed, tmp_path, run):
    import torch

    # the same adapter, on the server's machine, under a name of its own
    listed = run("--store", server.store, "--json", "ls").json
    assert [(line["name"], line["tag"], line["rank"]) for line in listed] == [
        ("me--french-lora", "latest", 4),
        ("me--french-lora", "main", 4),
    ]
    out = run("--store", server.store, "pull", "me--french-lora", "--to", tmp_path / "out")
    assert out.code == 0, out.err
    assert run("--store", server.store, "push", tmp_path / "out", "mine:v1").code == 0

    peft(server, None, tmp_path / "home", pushed / "base", tmp_path, "me/french-LoRA", "mine@v1")
    expected = torch.load(pushed / "me-french-LoRA-push.pt")
    assert torch.equal(expected, torch.load(tmp_path / "me-french-LoRA-.pt"))
    assert torch.equal(expected, torch.load(tmp_path / "mine-v1.pt"))


def test_a_name_that_a_server_keeps_is_moved_only_there(server, pushed, run, tmp_path):
    (line, *_) = run("--store", server.store, "--json", "ls", "me--french-lora").json
    for name in ("me--french-lora", "me--french-lora:main", "me--french-lora:v9"):
        refused = run("--store", server.store, "tag", line["digest"], name)
        assert refused.code == 4
        assert "a repository that a server keeps" in refused.err
    shown = run("--store", server.store, "--json", "show", "me--french-lora:main").json
    assert shown["digest"] == line["digest"]
    assert run("--store", server.store, "gc", "--yes", "--now").code == 0
    assert json.loads(run("--store", server.store, "--json", "fsck", "--deep").out)["holds"]
    shutil.copytree(server.store, tmp_path / "copy")
    assert run("--store", tmp_path / "copy", "rm", "me--french-lora").code == 0
