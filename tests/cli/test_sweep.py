"""``loraforge train sweep.yaml``: several adapters from one file, the losers dropped early."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from tests.cli.test_train import make_base, write

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own remarks


@pytest.fixture(autouse=True)
def _one_thread():
    """Small tensors on a busy machine: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture
def data(tmp_path):
    draw = random.Random(0)
    words = ["".join(draw.choice("abcdef") for _ in range(draw.randint(2, 6))) for _ in range(24)]
    return write(tmp_path / "d.jsonl", *({"prompt": f"{word}>", "completion": word.upper()} for word in words))


@pytest.fixture
def sweep(base, data, tmp_path):
    """Write a sweep.yaml: what is common to all tests, and what a test adds."""

    def write_sweep(text):
        path = tmp_path / "sweep.yaml"
        path.write_text(f"base: {base}\ndata: {data}\nepochs: 2\ndropout: 0.1\n{text}")
        return path

    return write_sweep


GRID = """
as: up:v1
val_split: 0.25
grid:
  lr: [1e-4, 1e-2, 1e-3]
  rank: [2, 4]
halving: {first: 2, eta: 3}
"""


def test_a_dry_run_says_what_would_run(sweep, run):
    done = run("train", sweep(GRID), "--dry-run")
    assert done.code == 0, done.err
    assert "up:v1-lr0.0001-rank2" in done.out
    assert "up:v1: of 6 go on 2 after 2 steps, 1 after 6 steps" in done.out
    assert max(map(len, done.out.splitlines())) <= 80
    found = run("train", sweep(GRID), "--dry-run", "--json").json
    assert [row["settings"] for row in found["adapters"]][:2] == [{"lr": 1e-4, "rank": 2}, {"lr": 1e-4, "rank": 4}]
    assert found["halving"] == {"up:v1": [{"step": 2, "kept": 2}, {"step": 6, "kept": 1}]}
    assert run("ls", "--json").json == []


def test_the_best_of_a_grid_takes_its_name(sweep, run):
    done = run("train", sweep(GRID), "--json")
    assert done.code == 0, done.err
    rows = {row["adapter"]: row for row in done.json["adapters"]}
    states = [row["state"] for row in rows.values()]
    assert (states.count("best"), states.count("dropped")) == (1, 5)
    assert sorted(row["steps"] for row in rows.values()) == [2, 2, 2, 2, 6, 10]
    best = done.json["best"]["up:v1"]
    assert rows[best]["eval_loss"] == min(row["eval_loss"] for row in rows.values())
    assert done.json["in_turns"] is None
    names = {f"{row['name']}:{row['tag']}": row["digest"] for row in run("ls", "--json").json}
    assert names == {best: rows[best]["digest"], "up:v1": rows[best]["digest"]}
    table = run("train", sweep(GRID), "--force").out
    assert f"up:v1 is {best}" in table


def test_an_adapter_is_stored_as_its_own_run_would_store_it(sweep, base, data, run):
    text = "adapters:\n  one:v1: {lr: 1e-2, rank: 3}\n  two:v1: {lr: 1e-3, seed: 7, batch_size: 3}\n"
    assert run("train", sweep(text)).code == 0
    together = {name: run("show", name, "--json").json for name in ("one:v1", "two:v1")}
    common = ("train", "--base", base, "--data", data, "--epochs", "2", "--dropout", "0.1")
    alone = run(*common, "--as", "one:v1", "--lr", "1e-2", "--rank", "3", "--force", "--json").json
    assert together["one:v1"]["derivation"] == alone["derivation"]
    assert together["one:v1"]["report"]["loss"] == pytest.approx(alone["report"]["loss"], rel=1e-4)
    own = run(*common, "--as", "two:v1", "--lr", "1e-3", "--seed", "7", "--batch-size", "3", "--force", "--json").json
    assert together["two:v1"]["derivation"] == own["derivation"]
    only = "adapters:\n  one:v1: {lr: 1e-2, rank: 3}\n"
    assert run("train", sweep(only), "--force", "--json").json["adapters"][0]["digest"] == alone["digest"], "to the bit"


def test_one_that_fails_is_named_and_the_others_are_stored(sweep, run):
    text = "max_grad_norm: 0\nadapters:\n  good: {lr: 1e-3}\n  bad: {lr: 1e30}\n"
    done = run("train", sweep(text))
    assert done.code == 1
    assert "bad:latest: step" in done.err
    assert [row["name"] for row in run("ls", "--json").json] == ["good"]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_an_ended_sweep_goes_on_to_the_same_adapters(sweep, run, tmp_path, how):
    path = sweep(
        "seed: 3\nsave_every: 1\nadapters:\n  a:v1: {lr: 1e-2, max_steps: 3}\n  b:v1: {lr: 1e-3, epochs: 30}\n"
    )
    whole = {row["adapter"]: row["digest"] for row in run("train", path, "--json").json["adapters"]}
    folder, store = tmp_path / "run", tmp_path / "other"
    command = [sys.executable, "-m", "loraforge_cli", "train", str(path), "--run", str(folder), "--store", str(store)]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(folder.glob("step-*"))) < 2:
        time.sleep(0.01)
    process.send_signal(how)
    assert process.wait() in (-signal.SIGKILL, 130)
    done = run("train", path, "--run", folder, "--store", store, "--resume", "--json")
    assert done.code == 0, done.err
    assert {row["adapter"]: row["digest"] for row in done.json["adapters"]} == whole
    again = run("train", path, "--run", folder, "--store", store, "--resume", "--json")
    assert {row["adapter"]: row["digest"] for row in again.json["adapters"]} == whole


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        ("grid: {lr: [1e-3]}\n", 2, "say what to call the adapters"),
        ("as: x\nadapters: {y: {}}\n", 2, "leave 'as' out"),
        ("adapters: {x: {lrr: 1}}\n", 2, "there is no setting 'lrr'; did you mean 'lr'?"),
        ("adapters: {x: {base: y}}\n", 2, "x: base is of all adapters"),
        ("adapters: {x: {run: y}}\n", 2, "x: run is of all adapters"),
        ("as: x\ngrid: {precision: [fp32]}\n", 2, "grid: precision is of all adapters"),
        ("adapters: [x]\n", 2, "adapters is list"),
        ("adapters: {x: 3}\n", 2, "x is int"),
        ("adapters: {x: {lr: 1, lr: 2}}\n", 2, "'lr' stands twice"),
        ("adapters: {X y: {}}\n", 2, "X y"),
        ("adapters: {x: {}, 'x:latest': {}}\n", 2, "x:latest stands twice"),
        ("as: x\ngrid: {lr: 1e-3}\n", 2, "grid: lr is"),
        ("as: x\ngrid: {lr: [yes]}\n", 2, "lr is True, expected a number"),
        ("as: x\ngrid: {lr: []}\n", 2, "expected a list of values"),
        ("as: x\ngrid: {lr: [1e-3, 0.001]}\n", 2, "two adapters would be called x:latest-lr0.001"),
        ("as: x\ngrid: {lr: [1e-3], rank: [0]}\n", 2, "rank is 0"),
        ("as: x\nhalving: {eta: 3}\n", 2, "halving has no 'first'"),
        ("as: x\nhalving: {first: 1, rungs: 3}\n", 2, "halving has a key 'rungs'"),
        ("as: x\nhalving: {first: 0}\n", 2, "halving: first is 0"),
        ("as: x\nhalving: {first: one}\n", 2, "halving: first is 'one'"),
        ("as: x\nat_once: 0\n", 2, "at_once is 0"),
        ("as: x\ngrid: {lr: [1, 2]}\nhalving: {first: 1}\n", 2, "judges its 2 adapters by their loss on the same data"),
        ("as: x\nval_split: 0.3\ngrid: {seed: [1, 2]}\nhalving: {first: 1}\n", 2, "on the same data"),
        ("as: x\nadapterz: {}\nat_once: 2\n", 2, "there is no setting 'adapterz'"),
    ],
)
def test_what_a_sweep_refuses_is_one_line(sweep, run, text, code, says):
    done = run("train", sweep(text), "--dry-run")
    assert done.code == code
    assert says in done.err
    assert done.err.count("\n") == 1
    assert not done.out


def test_flags_win_but_not_over_the_grid(sweep, run):
    path = sweep("as: x\nadapters: null\ngrid: {lr: [1e-3]}\n")
    assert "--lr out" in run("train", path, "--lr", "1", "--dry-run").err
    found = run("train", path, "--rank", "2", "--as", "y:v2", "--dry-run", "--json").json
    assert [row["adapter"] for row in found["adapters"]] == ["y:v2-lr0.001"]


def test_torchrun_and_a_missing_run_directory_are_refused(sweep, run, monkeypatch):
    path = sweep("as: x\ngrid: {lr: [1e-3]}\n")
    assert "--run DIR" in run("train", path, "--resume").err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "leave torchrun out" in run("train", path).err


def test_json_lines_tell_of_each_adapter(sweep, run, tmp_path):
    path = sweep("adapters: {a: {lr: 1e-3}, b: {lr: 1e-3, grad_accum: 2}}\n")
    assert run("train", path, "--run", tmp_path / "run").code == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {(line["name"], line["step"]) for line in lines} == {
        *(("a:latest", step) for step in range(1, 13)),
        *(("b:latest", step) for step in range(1, 7)),
    }
