"""``loraforge tree``: grown, looked at, reshaped and taken out, and every way to be refused in one line."""

import json
import shutil

import pytest
import torch

import loraforge as lf
from tests.bad_files import write_adapter
from tests.cli.test_train import make_base

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own remarks

FEW = ("--rank", "4", "--lr", "1e-2", "--batch-size", "2", "--max-steps", "6", "--targets", "q_proj,v_proj")


def write_lines(path, letter):
    lines = [{"prompt": f"{letter}{n} ", "completion": letter * (n % 5 + 1)} for n in range(8)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base, data, and a store with the tree t: french, law, french/loud, law/quiet."""
    import os

    from click.testing import CliRunner

    from loraforge_cli.main import cli

    home = tmp_path_factory.mktemp("tree")
    before = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    torch.set_num_threads(1)
    make_base(home / "base")
    for letter, name in zip("abcd", ("french", "law", "loud", "quiet"), strict=True):
        write_lines(home / f"{name}.jsonl", letter)
    commands = [
        ("tree", "create", "t", "--base", home / "base"),
        ("tree", "grow", "t", "french", "law", "--data", home / "french.jsonl", "--data", home / "law.jsonl", *FEW),
        ("tree", "grow", "t", "french/loud", "law/quiet", "--data", home / "loud.jsonl", *FEW),
    ]
    for command in commands:
        done = CliRunner().invoke(cli, [*map(str, command), "--store", str(home / "store"), "-q"])
        assert done.exit_code == 0, (done.output, done.exception)
    torch.set_num_threads(before[0])
    return home


@pytest.fixture
def home(made, tmp_path, monkeypatch):
    """A copy of its own, in the working directory."""
    shutil.copytree(made / "store", tmp_path / "store")
    for path in made.glob("*.jsonl"):
        shutil.copy(path, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORAFORGE_STORE", str(tmp_path / "store"))
    return tmp_path


def nodes(run):
    return run("--json", "tree", "show", "t").json["nodes"]


def test_a_tree_is_shown_as_text_picture_and_document(home, run):
    text = run("tree", "show", "t").out
    assert text.index("french") < text.index("loud") < text.index("law ") < text.index("quiet")
    svg = run("tree", "show", "t", "--format", "svg").out
    assert svg.startswith("<svg ")
    assert svg.count('class="t-branch"') == 4
    found = nodes(run)
    assert found["french/loud"]["parent"] == "french"
    assert found["french"]["parent"] is None
    assert {one["rank"] for one in found.values()} == {4}
    moves = run("tree", "log", "t").out
    assert "tree create" in moves


def test_each_node_is_better_than_its_parent_at_what_it_was_trained_on(home, run):
    for task, path, parent in (("french", "french", ""), ("law", "law", ""), ("loud", "french/loud", "french")):
        said = run("--json", "tree", "eval", "t", "--data", f"{task}.jsonl").json
        losses = {"": said["base"], **said["nodes"]}
        assert losses[path] < losses[parent]


def test_siblings_at_once_are_what_each_is_alone(home, made, run):
    assert run("tree", "create", "u", "--base", made / "base").code == 0
    data = ("--data", "french.jsonl", "--data", "law.jsonl")
    assert run("tree", "grow", "u", "french", "law", *data, *FEW, "--in-turns").code == 0
    at_once, in_turns = nodes(run), run("--json", "tree", "show", "u").json["nodes"]
    registry = lf.Registry(home / "store")
    for path in ("french", "law"):
        one, other = (registry.load(tree[path]["digest"]) for tree in (at_once, in_turns))
        for name, pair in one.targets.items():
            assert torch.allclose(pair.delta(), other.targets[name].delta(), rtol=1e-3, atol=1e-6), (path, name)
        facts = [lf.Registry(home / "store").store.manifest(a.origin.digest).derivation for a in (one, other)]
        assert facts[0] == facts[1]


def test_a_child_is_trained_as_on_the_checkpoint_of_its_parent(home, run):
    """Step for step the loss of a training on what ``tree merge`` wrote, with the same seed."""
    assert run("tree", "grow", "t", "french/x", "--data", "law.jsonl", *FEW, "--run", "one").code == 0
    assert run("tree", "merge", "t", "french", "--out", "./merged").code == 0
    told = ("--base", "./merged", "--data", "law.jsonl", "--as", "x:v1", *FEW, "--run", "two")
    assert run("train", *told).code == 0
    losses = [
        [json.loads(line)["loss"] for line in (home / folder / "metrics.jsonl").read_text().splitlines()]
        for folder in ("one", "two")
    ]
    assert len(losses[0]) == 6
    assert losses[0] == losses[1]
    registry = lf.Registry(home / "store")
    grown, trained = registry.load(nodes(run)["french/x"]["digest"]), registry.load("x:v1")
    assert all(torch.equal(pair.delta(), trained.targets[name].delta()) for name, pair in grown.targets.items())


def test_merged_verified_taken_back_and_flattened(home, made, run):
    assert run("tree", "merge", "t", "french/loud", "--out", "./loud").code == 0
    assert run("verify", "./loud").code == 0
    assert run("unmerge", "./loud", "--out", "./again").code == 0
    weights = "model.safetensors"
    assert (home / "again" / weights).read_bytes() == (made / "base" / weights).read_bytes()
    assert run("tree", "flatten", "t", "french/loud", "--as", "flat:v1").code == 0
    assert run("merge", made / "base", "flat:v1", "--out", "./flat").code == 0
    assert (home / "flat" / weights).read_bytes() == (home / "loud" / weights).read_bytes()
    assert run("pull", "flat:v1", "--to", "./plain").code == 0
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(made / "base"), home / "plain")
    assert len([name for name, _ in model.named_parameters() if "lora_A" in name]) == 2


def test_reshaped_and_every_node_that_was_derived_is_derived_again(home, made, run):
    write_adapter(home / "stranger")
    assert run("tree", "squash", "t", "french/loud").code == 0
    assert run("tree", "rebase", "t", "law/quiet", "--onto", "loud").code == 0
    assert run("tree", "move", "t", "loud", "big").code == 0
    assert run("tree", "flatten", "t", "big/quiet", "--rank", "2", "--as", "small:v1").code == 0
    assert run("tree", "graft", "t", "law/small", "small:v1").code == 0
    found = nodes(run)
    assert set(found) == {"big", "big/quiet", "law", "law/small"}
    for path, node in found.items():
        ran = run("rebuild", node["digest"], "--verify")
        assert ran.code == (2 if path == "law" else 0), (path, ran.err)
    assert run("rebuild", "small:v1", "--verify").code == 0
    assert run("tree", "prune", "t", "big").code == 4
    assert run("tree", "prune", "t", "big/quiet").code == 0
    assert run("tree", "prune", "t", "big").code == 0
    assert run("fsck", "--deep").code == 0
    assert run("gc", "--yes").code == 0
    assert run("tree", "show", "t").code == 0


def test_a_tree_goes_to_another_store_and_comes_back_whole(home, run):
    (home / "team").mkdir()
    team = (home / "team").as_uri()
    sent = run("--json", "push", "t", "--to", team).json
    assert sent["sent"] > 0
    assert sent["remote"] == f"{team}#t:latest"
    assert run("--json", "push", "t", "--to", team).json["sent"] == 0
    there = run("--json", "--store", home / "team", "tree", "show", "t").json
    assert there["digest"] == run("--json", "tree", "show", "t").json["digest"]
    pulled = run("--json", "--store", home / "other", "pull", f"{team}#t", "--as", "mine").json
    assert (pulled["name"], pulled["digest"]) == ("mine", there["digest"])
    assert pulled["received"] > 0
    assert run("--json", "--store", home / "other", "pull", f"{team}#t").json["received"] == 0
    for store in ("team", "other"):
        assert run("--store", home / store, "fsck", "--deep").code == 0
    assert run("--store", home / "other", "tree", "merge", "mine", "french/loud", "--out", "./merged").code == 0
    refused = run("push", "t", "--to", "hf://me/tree")
    assert refused.code in (2, 5)
    assert refused.err.count("\n") == 1


BAD = [
    ("tree show nothing", 3, "no nothing"),
    ("tree show french:v1", 3, "french"),
    ("tree create t --base ./base", 4, "is there already"),
    ("tree create u --base ./nothing", 3, "nothing"),
    ("tree grow t", 2, "NODE"),
    ("tree grow t new", 2, "--data"),
    ("tree grow t french --data french.jsonl", 4, "is there already"),
    ("tree grow t a/b/c --data french.jsonl", 3, "no a"),
    ("tree grow t a a --data french.jsonl", 2, "twice"),
    ("tree grow t a b c --data french.jsonl --data law.jsonl", 2, "2 --data for 3 nodes"),
    ("tree grow t ../x --data french.jsonl", 2, "no path of a node"),
    ("tree grow t readme.md --data french.jsonl", 2, "no path of a node"),
    ("tree grow t new --data nothing.jsonl", 3, "nothing.jsonl"),
    ("tree grow t new --data french.jsonl --rank 0", 2, "rank"),
    ("tree grow t french/new --data french.jsonl --dora", 2, "DoRA"),
    ("tree grow t new --data french.jsonl --resume", 2, "--run"),
    ("tree eval t --data nothing.jsonl", 3, "nothing.jsonl"),
    ("tree merge t nothing --out ./out", 3, "no node 'nothing'"),
    ("tree merge t fr --out ./out", 3, "no node 'fr'"),
    ("tree flatten t french --as Bad", 2, "Bad"),
    ("tree rebase t french --onto french/loud", 4, "grew on french"),
    ("tree move t french law", 4, "law"),
    ("tree prune t french", 4, "french/loud"),
    ("tree squash t french", 4, "one node"),
    ("tree graft t french nothing:v1", 4, "french"),
    ("tree graft t other nothing:v1", 3, "nothing"),
    ("tree nonsense t", 2, "no command 'nonsense'"),
    ("merge ./base t --out ./out", 2, "tree"),
    ("compose t --as x:v1", 2, "tree"),
]


@pytest.mark.parametrize(("command", "code", "says"), BAD, ids=[row[0] for row in BAD])
def test_bad_input_is_refused_in_one_line_and_nothing_moves(home, made, run, command, code, says):
    if "./base" in command and "create" not in command:
        shutil.copytree(made / "base", home / "base")
    before = {path: path.read_bytes() for path in (home / "store" / "refs").rglob("*") if path.is_file()}
    ran = run(*command.split())
    assert ran.code == code, ran.err
    assert says in ran.err
    assert ran.err.count("\n") == 1
    assert ran.out == ""
    assert before == {path: path.read_bytes() for path in (home / "store" / "refs").rglob("*") if path.is_file()}
    assert not (home / "out").exists()
