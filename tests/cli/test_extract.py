"""``loraforge extract`` from the command line."""

import json

import pytest
import torch
from safetensors.torch import save_file

import loraforge as lf
from loraforge_cli.output import WIDTH

Q, K, NORM = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.norm"
NAME = "acme/base-1b"


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.02


def write(folder, tensors):
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"_name_or_path": NAME, "model_type": "llama"}))
    return folder


@pytest.fixture
def models(tmp_path):
    """A base, and a fine-tune of it: rank 2 on one matrix, rank 4 on the other, and a norm."""
    before = {f"{Q}.weight": normal(128, 96, seed=1), f"{K}.weight": normal(128, 96, seed=2)}
    before = {name: tensor.bfloat16() for name, tensor in before.items()} | {f"{NORM}.weight": torch.ones(96)}
    after = {f"{NORM}.weight": torch.full((96,), 1.25)}
    for rank, name in ((2, Q), (4, K)):
        update = normal(128, rank, seed=3) @ normal(rank, 96, seed=4)
        after[f"{name}.weight"] = (before[f"{name}.weight"].float() + update).bfloat16()
    return write(tmp_path / "base", before), write(tmp_path / "finetuned", after)


def test_the_whole_way(models, run, tmp_path):
    """What is stored is what the library extracts, with its lineage and its report; show and pull know it."""
    made = run("extract", *models, "--as", "french:v1", "--auto", "--save", "auto")
    assert (made.code, made.err) == (0, "")
    first, *rest = made.out.splitlines()
    assert first.startswith("french:v1  sha256:")
    assert "rank 2..4, 2 targets" in first
    for fragment in (
        "q_proj",
        "CAPTURED",
        "NOISE",
        "ERROR",
        "SAVED WHOLE",
        "model.norm.weight",
    ):
        assert fragment in made.out
    assert max(map(len, rest)) <= WIDTH
    expected = lf.extract(*models, auto=True, save="auto")
    stored = lf.load("french:v1")
    assert lf.content_id(stored) == lf.content_id(expected.adapter)
    assert stored.derivation == expected.adapter.derivation
    shown = run("show", "french:v1")
    assert NAME in shown.out
    assert "extract (auto True, max_rank 128" in shown.out
    assert run("pull", "french:v1", "--to", tmp_path / "out").code == 0
    assert lf.content_id(lf.load(tmp_path / "out")) == lf.content_id(expected.adapter)


def test_json(models, run):
    document = run("extract", *models, "--as", "x", "--rank", "3", "--save", "none", "--json").json
    assert (document["name"], document["tag"], document["rank"]) == ("x", "latest", 3)
    assert document["base"] == {"name": NAME, "revision": None}
    assert document["derivation"]["operation"] == "extract"
    assert [item["weight"] for item in document["derivation"]["inputs"]] == [1.0, -1.0]
    assert document["report"]["left_out"] == f"{NORM}.weight"
    assert set(document["report"]["targets"][Q]) == {"captured", "error", "noise", "rank"}
    assert document["targets"][Q]["error"] == document["report"]["targets"][Q]["error"] > 0
    assert run("show", "x", "--json").json == document


def test_a_dry_run_stores_nothing(models, run):
    ran = run("extract", *models, "--energy", "0.9", "--drop", "norm", "--dry-run")
    assert ran.code == 0
    assert ran.out.startswith("would make: rank ")
    assert "LEFT OUT" in ran.out
    plan = run("extract", *models, "--energy", "0.9", "--save", "norm", "--dry-run", "--json").json
    assert plan["dry_run"] is True
    assert plan["report"]["saved"] == 1
    assert run("ls", "--json").json == []


def test_a_tag_stays_unless_forced(models, run):
    assert run("extract", *models, "--as", "x:v1", "--rank", "1", "--save", "auto").code == 0
    again = run("extract", *models, "--as", "x:v1", "--rank", "2", "--save", "auto")
    assert (again.code, "--force" in again.err) == (4, True)
    assert run("extract", *models, "--as", "x:v1", "--rank", "2", "--save", "auto", "--force").code == 0


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--as", "x", "--auto"], 2, f"'{NORM}.weight' changed, and no LoRA can hold it"),
        (["--auto", "--save", "auto"], 2, "--as NAME"),
        (["--as", "x", "--save", "auto"], 2, "exactly one of rank, energy, auto"),
        (["--as", "x", "--save", "auto", "--rank", "2", "--auto"], 2, "rank and auto given"),
        (["--as", "x", "--save", "auto", "--save", "norm", "--auto"], 2, "'auto' is the end of no"),
        (["--as", "x", "--drop", "nrom", "--auto"], 2, "'nrom' is the end of no"),
        (["--as", "X y", "--auto"], 2, "X y"),
    ],
)
def test_refusals_are_one_line(models, run, options, code, says):
    ran = run("extract", *models, *options)
    assert (ran.code, ran.out) == (code, "")
    assert says in ran.err
    assert len(ran.err.splitlines()) == 1
    assert run("ls", "--json").json == []


def test_what_is_no_checkpoint_is_named(models, run, tmp_path):
    missing = run("extract", models[0], tmp_path / "nothing", "--as", "x", "--auto")
    assert (missing.code, "nothing" in missing.err) == (3, True)
    url = run("extract", "hf://acme/base", models[1], "--as", "x", "--auto")
    assert (url.code, "hf://acme/base" in url.err) == (2, True)
