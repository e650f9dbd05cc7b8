"""What the commands do with good input."""

import hashlib
import subprocess
import sys

import pytest

import loraforge as lf
from loraforge_cli.commands.tree import TABLE as TREE
from loraforge_cli.main import COMMANDS
from loraforge_cli.output import WIDTH
from loraforge_registry.store import Store
from tests.bad_files import TARGETS, config, tensors, write_adapter

CONTRACT = {
    "digest", "content_id", "name", "tag", "base", "rank", "parameters", "size", "targets", "derivation", "parents",
    "report",
}  # fmt: skip


@pytest.fixture
def two(tmp_path, run):
    """french:v1 and law:v1 in the default store."""
    settings = config(base_model_name_or_path="some/base")
    write_adapter(tmp_path / "french", settings=settings)
    write_adapter(tmp_path / "law", weights=tensors(-0.25, rank=3), settings={**settings, "r": 3})
    assert run("push", tmp_path / "french", "french:v1").code == 0
    assert run("push", tmp_path / "law", "law:v1").code == 0
    return tmp_path


def compose(run, *more):
    return run("compose", "french:v1=0.7", "law:v1=0.3", "--as", "blend:v1", *more)


def test_the_whole_way(two, run):
    """push, compose, show, pull, and what came out is the sum of what went in."""
    assert compose(run, "--rank", "2").code == 0
    shown = run("show", "blend:v1")
    for fragment in ("blend:v1", "some/base", "sha256:", "0.7 x french:v1", "0.3 x law:v1", "rank", "ERROR"):
        assert fragment in shown.out
    assert run("pull", "blend:v1", "--to", two / "out").code == 0
    french, law, out = lf.load(two / "french"), lf.load(two / "law"), lf.load(two / "out")
    exact = lf.rerank(lf.linear([(french, 0.7), (law, 0.3)]), rank=2).adapter
    assert lf.content_id(out) == lf.content_id(exact)


def test_show_says_the_spectrum(two, run):
    found = run("--json", "show", "french:v1", "--spectrum").json
    adapter = lf.load("french:v1")
    for name, row in found["targets"].items():
        s = lf.rerank(adapter, rank=1).report.targets[name].spectrum
        said = row["spectrum"]
        assert said["values"] == pytest.approx(s, rel=1e-9, abs=1e-12)
        assert said["stable_rank"] == pytest.approx((said["norm"] / s[0]) ** 2)
        assert set(said["rank_for"]) == {"0.9", "0.99", "0.999"}
    shown = run("show", two / "french", "--spectrum")
    assert (shown.code, "STABLE" in shown.out, "EFFECTIVE" in shown.out) == (0, True, True)
    assert all(len(line) <= WIDTH for line in shown.out.partition("STABLE")[2].splitlines())
    assert "spectrum" not in run("--json", "show", "french:v1").out


def test_push_keeps_files_byte_for_byte_and_is_idempotent(two, run):
    (two / "french" / "README.md").write_text("# french\n")
    first = run("push", two / "french", "other:v1", "--json").json
    again = run("push", two / "french", "other:v1", "--json").json
    assert first == again
    for path, file in first["files"].items():
        assert file["digest"] == "sha256:" + hashlib.sha256((two / "french" / path).read_bytes()).hexdigest()
    assert set(first["files"]) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}


def test_push_takes_the_directorys_name_and_says_what_it_leaves_out(tmp_path, run):
    folder = write_adapter(tmp_path / "My Adapter")
    (folder / "tokenizer.json").write_text("{}")
    ran = run("push", folder)
    assert ran.out.startswith("my-adapter:latest  sha256:")
    assert "tokenizer.json" in ran.err


def test_push_of_a_file_takes_the_config_beside_it(two, run):
    ran = run("push", two / "french" / "adapter_model.safetensors", "file:v1", "--json").json
    assert ran["digest"] == run("show", "french:v1", "--json").json["digest"]


def test_tags_stay_and_latest_moves(two, run):
    write_adapter(two / "french", weights=tensors(0.75), settings=config(base_model_name_or_path="some/base"))
    refused = run("push", two / "french", "french:v1")
    assert (refused.code, "--force" in refused.err) == (4, True)
    assert run("push", two / "french", "french:v1", "--force").code == 0
    assert run("push", two / "law", "moving").code == 0
    assert run("push", two / "french", "moving").code == 0
    moves = run("log", "moving", "--reflog", "--json").json
    assert [move["what"] for move in moves] == ["push", "push"]
    assert moves[0]["old"] == moves[1]["new"]


@pytest.mark.parametrize("command", ["show", "pull", "compose", "rerank"])
def test_json_has_the_keys_that_scripts_rely_on(two, run, command):
    document = {
        "show": lambda: run("show", "french:v1", "--json"),
        "pull": lambda: run("pull", "french:v1", "--to", two / "out", "--json"),
        "compose": lambda: compose(run, "--rank", "2", "--json"),
        "rerank": lambda: run("rerank", "law:v1", "--rank", "1", "--as", "small", "--json"),
    }[command]().json
    assert set(document) >= CONTRACT
    assert set(document["targets"]) == set(TARGETS)
    for target in document["targets"].values():
        assert set(target) >= {"rank", "alpha", "shape", "error"}


def test_json_and_store_may_stand_in_front_of_the_command(two, run):
    assert run("--json", "ls").json == run("ls", "--json").json
    other = two / "other-store"
    assert run("--store", other, "ls", "--json").json == []
    assert run("push", two / "law", "law:v1", "--store", other).code == 0
    assert len(run("--store", other, "ls", "--json").json) == 1


def test_lineage_reaches_through_results(two, run):
    compose(run, "--rank", "2")
    assert run("rerank", "blend:v1", "--rank", "1", "--as", "small:v1").code == 0
    shown = run("log", "small:v1").out
    assert shown.splitlines()[0].startswith("small:v1  <- rerank (rank 1)")
    assert "french:v1" in shown
    document = run("log", "small:v1", "--json").json
    digests = {run("show", f"{name}:v1", "--json").json["digest"] for name in ("blend", "french", "law")}
    assert set(document["ancestors"]) == digests


def test_directories_in_a_compose_enter_the_store_with_the_result(two, run):
    write_adapter(two / "third", weights=tensors(2.0), settings=config(base_model_name_or_path="some/base"))
    before = run("du", "--json").json["artifacts"]
    made = run("compose", f"{two}/third=0.5", "law:v1=-1", "--as", "made:v1", "--json").json
    assert run("du", "--json").json["artifacts"] == before + 2
    third = next(item for item in made["derivation"]["inputs"] if item["weight"] == 0.5)
    assert run("show", third["digest"], "--json").json["content_id"] == third["content_id"]


def test_dry_run_stores_nothing(two, run):
    before = run("du", "--json").json
    assert "would make: rank 2" in compose(run, "--rank", "2", "--dry-run").out
    assert run("rerank", "law:v1", "--energy", "0.9", "--dry-run").code == 0
    assert run("du", "--json").json == before


def test_diff_sees_functions_not_factors(two, run):
    assert run("compose", "french:v1=0.5", "french:v1=0.5", "--as", "same:v1").code == 0
    assert run("diff", "french:v1", "same:v1", "--json").json["difference"] == 0
    assert run("compose", "french:v1=0.5", "--as", "half:v1").code == 0
    document = run("diff", "french:v1", "half:v1", "--json").json
    assert document["difference"] == pytest.approx(0.5)
    assert document["tensors"] == {"equal": 4, "changed": 0, "removed": 0, "added": 0}
    assert "scale" in run("diff", "french:v1", "half:v1").out


def test_rm_takes_names_away_and_tag_brings_them_back(two, run):
    digest = run("show", "law:v1", "--json").json["digest"]
    assert run("rm", "law:v1").code == 0
    assert run("show", "law:v1").code == 3
    assert run("tag", digest[:20], "law:v1").code == 0
    assert run("show", f"law@{digest}", "--json").json["digest"] == digest


def test_rm_removes_all_or_none(two, run):
    assert run("rm", "law:v1", "missing:v1").code == 3
    assert run("show", "law:v1").code == 0


def test_what_no_name_needs_is_reclaimable_but_a_parent_is_needed(two, run):
    compose(run)
    assert run("rm", "law:v1", "french:v1").code == 0
    assert run("du", "--json").json["reclaimable"] == 0
    assert run("rm", "blend:v1").code == 0
    usage = run("du", "--json").json
    assert usage["reclaimable"] == usage["physical"] > 0


def test_pull_again_into_the_same_directory_is_done_already(two, run):
    assert run("pull", "law:v1", "--to", two / "out").code == 0
    assert run("pull", "law:v1", "--to", two / "out").code == 0
    assert run("pull", "french:v1", "--to", two / "out").code == 4


def test_show_of_a_directory_needs_no_store(two, run):
    shown = run("show", two / "french", "--store", two / "nowhere", "--json").json
    assert shown["content_id"] == run("show", "french:v1", "--json").json["content_id"]
    assert shown["digest"] is None
    assert not (two / "nowhere").exists()


def test_an_empty_store_is_not_made_by_looking(tmp_path, run):
    ran = run("ls", "--store", tmp_path / "none")
    assert (ran.code, ran.out) == (0, "")
    assert "push" in ran.err
    assert not (tmp_path / "none").exists()


def test_tables_fit_eighty_columns(two, run):
    long = [f"model.decoder.{'very_' * 12}long.layers.{i}.self_attention.q_projection" for i in range(3)]
    from tests.bad_files import pair

    weights = {name: row for target in long for name, row in pair(target, rows=40, columns=60).items()}
    write_adapter(two / "long", weights=weights, settings=config(target_modules=long, base_model_name_or_path="b" * 90))
    assert run("push", two / "long", f"{'n' * 60}:{'t' * 40}").code == 0
    compose(run, "--rank", "2")
    name = f"{'n' * 60}:{'t' * 40}"
    for arguments in (("ls",), ("show", name, "--all"), ("diff", "law:v1", "blend:v1"), ("diff", "law:v1", name)):
        lines = run(*arguments).out.splitlines()
        tables = [line for line in lines if not line.startswith(("name ", "base ", "digest ", "content id "))]
        assert max(map(len, tables)) <= WIDTH, arguments


def test_the_command_line_offers_every_method():
    from loraforge.compose import METHODS
    from loraforge_cli.commands.compose import command

    choices = next(option for option in command.params if option.name == "method").type.choices
    assert list(choices) == list(METHODS)


@pytest.mark.parametrize("command", [*COMMANDS, *(f"tree {name}" for name in TREE)])
def test_every_command_has_help(run, command):
    ran = run(*command.split(), "--help")
    assert ran.code == 0
    assert "--json" in ran.out or command in ("tree", "serve")


def test_completion_offers_names(two):
    script = (
        "import os, sys; os.environ.update(_LORAFORGE_COMPLETE='bash_complete', COMP_WORDS='loraforge show fr', "
        "COMP_CWORD='2'); sys.argv = ['loraforge']; from loraforge_cli.main import main; main()"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "french:v1" in ran.stdout


def test_python_and_the_command_line_share_a_store(two, run):
    registry = lf.Registry()
    adapter = registry.load("french:v1")
    assert str(adapter.origin.digest) == run("show", "french:v1", "--json").json["digest"]
    small = lf.rerank(adapter, rank=1)
    digest = registry.push(small, "small:v1")
    shown = run("show", "small:v1", "--json").json
    assert shown["digest"] == str(digest)
    assert shown["report"]["error"] == pytest.approx(small.report.error, rel=1e-5)
    assert Store().resolve("small:v1") == digest
    assert [str(line.ref) for line in registry.ls()] == ["french:v1", "law:v1", "small:v1"]
