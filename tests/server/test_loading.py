"""What a page says of loading: each line is run, as it was copied, by the programs that it names."""

import ast
import os
import re
import shlex
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi

from tests.bad_files import config, pair, tensors, write_adapter
from tests.hub import ROOT, Server
from tests.server import raw

MAKE = """
import sys
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

base, adapter, out = sys.argv[1:]
torch.manual_seed(0)
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, max_position_embeddings=32)
LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes)).save_pretrained(base)
lora = LoraConfig(r=24, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora).eval()
model.save_pretrained(adapter)
torch.save(model(torch.arange(16).reshape(1, 16)).logits, out)
"""
# what `vllm serve` of 0.33 takes of a LoRA, and how many words follow
VLLM = {"--enable-lora": 0, "--lora-modules": 1, "--max-lora-rank": 1}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with Server(tmp_path_factory.mktemp("loading") / "store") as server:
        server.token = server.add_user("me")
        yield server


def program(folder, *command, token=None):
    """Run a program as somebody would who has neither a cache nor a login."""
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("HF_", "LORAFORGE_", "TRANSFORMERS_"))
    }
    (folder / "bin").mkdir(exist_ok=True)  # vLLM needs a GPU: here it only writes down what it was asked
    (folder / "bin" / "vllm").write_text(f"#!/bin/sh\nprintf '%s\\n' \"$@\" > {folder}/vllm-was-asked\n")
    (folder / "bin" / "vllm").chmod(0o755)
    path = os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), inherited["PATH"]])
    environment = {
        **inherited,
        "PATH": path,
        "HF_HOME": str(folder / "cache"),
        "LORAFORGE_STORE": str(folder / "store"),
    }
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "registry", ROOT / "cli")))}
    environment |= {"HF_TOKEN": token} if token else {}
    return subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, check=False, timeout=300
    )


def lines(server, path, token=None):
    """The blocks under "Load it", by their titles, and what else stands there."""
    page = raw.request(server, "GET", path, token=token).body.decode()
    part = re.search("<h2>Load it</h2>(.*?)<h2>", page, re.DOTALL)[1]
    found = re.findall("<h3>(.*?)</h3><pre data-copy>(.*?)</pre>", part, re.DOTALL)
    return {title.rpartition(" ")[2]: unescape(code) for title, code in found}, part


def options(folder):
    """The options that vLLM was called with, as its parser takes them."""
    verb, base, *words = (folder / "vllm-was-asked").read_text().splitlines()
    assert verb == "serve"
    found = {}
    while words:
        name, count = words[0], VLLM[words[0]]
        found[name], words = words[1 : 1 + count], words[1 + count :]
    return base, found


def test_the_lines_load_the_adapter(server, run, tmp_path):
    made = program(tmp_path, sys.executable, "-c", MAKE, tmp_path / "base", tmp_path / "made", tmp_path / "logits.pt")
    assert made.returncode == 0, made.stderr[-2000:]
    assert run("--store", server.store, "push", tmp_path / "made", "me--french:v1").code == 0
    blocks, _ = lines(server, "/me/french")
    assert set(blocks) == {"Python", "vLLM", "loraforge"}

    more = 'import torch\ntorch.save(model.eval()(torch.arange(16).reshape(1, 16)).logits, "loaded.pt")'
    done = program(tmp_path, sys.executable, "-c", f"{blocks['Python']}\n{more}")
    assert done.returncode == 0, done.stderr[-2000:]
    assert torch.equal(torch.load(tmp_path / "loaded.pt"), torch.load(tmp_path / "logits.pt"))

    done = program(tmp_path, "sh", "-c", blocks["vLLM"])
    assert done.returncode == 0, done.stderr[-2000:]
    base, found = options(tmp_path)
    assert base == "BASE"  # a path on somebody's disk is none for vLLM
    assert found == {"--enable-lora": [], "--max-lora-rank": ["32"], "--lora-modules": ["french=./french"]}
    weights = (tmp_path / "made" / "adapter_model.safetensors").read_bytes()
    assert (tmp_path / "french" / "adapter_model.safetensors").read_bytes() == weights

    again = tmp_path / "again"
    again.mkdir()
    done = program(again, "sh", "-c", blocks["loraforge"])
    assert done.returncode == 0, done.stderr[-2000:]
    assert (again / "french" / "adapter_model.safetensors").read_bytes() == weights


def test_the_lines_are_about_the_revision_that_is_shown(server, run, tmp_path):
    for tag, value in (("v1", 0.5), ("v2", 0.25)):
        write_adapter(tmp_path / tag, weights=tensors(value), settings=config(base_model_name_or_path="acme/base"))
        assert run("--store", server.store, "push", tmp_path / tag, f"me--moved:{tag}").code == 0
    assert "v1" not in lines(server, "/me/moved")[1]
    assert "v1" not in lines(server, "/me/moved/tree/main")[1]
    blocks, _ = lines(server, "/me/moved/tree/v1")
    for number, command in enumerate((blocks["vLLM"], blocks["loraforge"])):
        home = tmp_path / f"home{number}"
        home.mkdir()
        done = program(home, "sh", "-c", command)
        assert done.returncode == 0, done.stderr[-2000:]
        weights = (home / "moved" / "adapter_model.safetensors").read_bytes()
        assert weights == (tmp_path / "v1" / "adapter_model.safetensors").read_bytes()
    assert 'snapshot_download("me/moved", revision="v1", ' in blocks["Python"]
    assert options(tmp_path / "home0")[0] == "acme/base"
    # another spelling of a name is no name for every program: the commit is
    commit = re.search('revision="([0-9a-f]{40})"', lines(server, "/me/moved/tree/refs%2Ftags%2Fv1")[0]["Python"])[1]
    assert lines(server, f"/me/moved/tree/{commit}")[0]["loraforge"].split()[4] == f"hf://me/moved@{commit}"


def test_what_is_private_is_loaded_with_a_token(server, tmp_path):
    api = HfApi(server.url, token=server.token)
    api.create_repo("me/mine", private=True)
    api.upload_folder(repo_id="me/mine", folder_path=write_adapter(tmp_path / "adapter"))
    blocks, said = lines(server, "/me/mine", token=server.token)
    assert "set HF_TOKEN" in said
    assert program(tmp_path, "sh", "-ec", blocks["vLLM"]).returncode != 0
    done = program(tmp_path, "sh", "-ec", blocks["vLLM"], token=server.token)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "mine" / "adapter_config.json").exists()
    assert server.token not in said


def test_a_name_without_an_organisation_is_loaded_too(server, run, tmp_path):
    assert run("--store", server.store, "push", write_adapter(tmp_path / "alone"), "alone:v1").code == 0
    blocks, _ = lines(server, "/alone")
    assert set(blocks) == {"Python", "vLLM"}  # hf:// has an organisation
    done = program(tmp_path, "sh", "-ec", blocks["vLLM"])
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("changes", "rank", "said"),
    [
        ({"init_lora_weights": "olora"}, 2, "init_lora_weights &#x27;olora&#x27;"),
        ({"r": 513}, 513, "rank 513, above its limit of 512"),
        ({"r": 16}, 16, None),
        ({"r": 17}, 17, "--max-lora-rank 32"),
        ({"r": 2, "rank_pattern": {"q": 100}}, 2, "--max-lora-rank 128"),
    ],
)
def test_what_vllm_refuses_is_said_instead(server, run, tmp_path, changes, rank, said):
    weights = pair("model.layers.0.v", rank=rank) | pair(
        "model.layers.0.q", rank=100 if "rank_pattern" in changes else rank
    )
    adapter = write_adapter(tmp_path / "a", weights=weights, settings=config(**changes))
    assert run("--store", server.store, "push", adapter, "me--odd:v1", "--force").code == 0
    blocks, part = lines(server, "/me/odd")
    refused = said is not None and not said.startswith("--")
    assert ("vLLM" not in blocks) == refused == ("will not serve" in part)
    assert said in part if said else "--max-lora-rank" not in part


def test_a_strangers_base_runs_nothing(server, run, tmp_path):
    for number, base in enumerate(
        ("x; touch hacked", "--model=x", "$(touch hacked)", 'x")\nopen("hacked", "w")#', "../x")
    ):
        settings = config(base_model_name_or_path=base, task_type="SEQ_CLS")
        assert (
            run("--store", server.store, "push", write_adapter(tmp_path / "a", settings=settings), f"e{number}:v1").code
            == 0
        )
        blocks, _ = lines(server, f"/e{number}")
        assert shlex.split(blocks["vLLM"].partition("vllm serve ")[2])[0] == "BASE"
        calls = [node for node in ast.walk(ast.parse(blocks["Python"])) if isinstance(node, ast.Call)]
        assert [ast.unparse(call.func) for call in calls] == [
            "AutoModelForSequenceClassification.from_pretrained",
            "snapshot_download",
            "PeftModel.from_pretrained",
        ]
        assert calls[0].args[0].value == base
