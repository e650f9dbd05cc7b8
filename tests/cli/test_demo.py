"""The demo holds what it shows, and the tasks in it are what they say."""

import pytest

from loraforge_cli.demo_tasks import NUMBERS, UNSEEN, french, roman

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' and PEFT's own remarks


def test_each_adapter_is_good_at_its_own_task_alone_and_every_claim_holds(run, monkeypatch, tmp_path):
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "error" if "VERBOSITY" in name else "1")  # what the demo sets is taken back
    done = run("demo", "--json", "--keep", tmp_path / "kept")
    assert done.code == 0, done.err
    losses = done.json["losses"]
    base = losses["(the base)"]
    for own, other in (("french", "law"), ("law", "french")):
        assert losses[own][own] < 0.2 * base[own]
        assert losses[own][other] > base[other]
    for child in ("french/loud", "law/quiet"):
        assert losses[child][child] < 0.5 * base[child]
        assert min(losses, key=lambda node: losses[node][child]) == child
    assert done.json["base_again"]
    assert done.json["pulled"]
    exact, small, linear, svd = done.json["methods"]
    assert exact["error"] < 1e-6 < small["error"] < linear["error"]
    assert small["error"] <= svd["error"] + 1e-6
    assert done.json["reported_error"] == pytest.approx(small["error"], rel=1e-4)
    assert done.json["self_average"]["loraforge_error"] < 1e-6
    assert done.json["self_average"]["peft_factor"] == pytest.approx(2, rel=1e-3)
    assert done.json["logits"]["difference"] < 1e-5 * done.json["logits"]["largest"]
    kept = tmp_path / "kept"
    made = {"base", "numbers.svg", "french", "law", "french-law", "loud", "base-again", "team", "store"}
    assert made <= {path.name for path in kept.iterdir()}
    for node in run("tree", "show", "numbers", "--json", "--store", kept / "store").json["nodes"].values():
        shown = run("show", node["digest"], "--json", "--store", kept / "store").json
        parameters = shown["derivation"]["parameters"]
        logged = run("log", node["digest"], "--store", kept / "store").out
        assert f"<- train (alpha {parameters['alpha']}, base {parameters['base'][:19]}, data " in logged
        assert "torch" in parameters
        assert "torch" not in logged
    for reference in ("french:v1", "law:v1", "french-law:v1"):
        assert run("rebuild", reference, "--verify", "--store", kept / "store").code == 0


def test_the_tasks_are_french_and_roman_numerals():
    assert [french(n) for n in (1, 16, 17, 21, 40, 69)] == [
        "un",
        "seize",
        "dix-sept",
        "vingt et un",
        "quarante",
        "soixante-neuf",
    ]
    assert [roman(n) for n in (1, 4, 9, 14, 40, 49, 69)] == ["I", "IV", "IX", "XIV", "XL", "XLIX", "LXIX"]
    assert len({french(n) for n in NUMBERS}) == len({roman(n) for n in NUMBERS}) == len(NUMBERS)
    seen = set(NUMBERS) - set(UNSEEN)
    assert all(any(s // 10 == n // 10 for s in seen) and any(s % 10 == n % 10 for s in seen) for n in UNSEEN)
