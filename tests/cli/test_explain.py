"""``loraforge explain``: what an adapter is made of, said at the command line."""

import pytest

import loraforge as lf
from tests.unit.recipe.adapters import drawn


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """french, law, a blend of them, one by a gradient, and one that has nothing to do with them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORAFORGE_STORE", str(tmp_path / "store"))
    registry = lf.Registry(tmp_path / "store")
    for seed, name in enumerate(("french", "law", "stranger")):
        registry.push(drawn(seed, rank=1 + seed), f"{name}:v1")
    french, law = registry.load("french:v1"), registry.load("law:v1")
    registry.push(lf.linear([(french, 0.7), (law, -0.3)]), "blend:v1")
    registry.push(lf.linear([(lf.select(french, gradient=[0.5, 1.5]), 1.0), (law, 0.25)]), "slope:v1")
    lf.save(registry.load("blend:v1"), tmp_path / "loose")
    return registry


def test_a_combination_is_found_with_its_coefficients(registry, run):
    said = run("--json", "explain", "blend:v1").json
    assert {part["source"]: round(part["coefficient"], 5) for part in said["parts"]} == {
        "french:v1": 0.7,
        "law:v1": -0.3,
    }
    assert said["residual"] < 3e-7
    text = run("explain", "./loose").out
    assert text.splitlines()[0].split() == ["COEFFICIENT", "ADAPTER", "SIZE"]
    assert "0.7  french:v1" in text
    assert "among 3 adapters" in text


def test_what_is_unrelated_says_so(registry, run):
    said = run("--json", "explain", "stranger:v1", "--among", "french:v1").json
    assert said["residual"] > 0.9
    text = run("explain", "stranger:v1", "--among", "french:v1").out
    assert "residual" in text
    assert "model.layers.*.self_attn.q_proj" in text, "and where it is left over"


def test_by_layer_a_gradient_is_found(registry, run):
    assert run("--json", "explain", "slope:v1").json["residual"] > 1e-3
    layers = run("--json", "explain", "slope:v1", "--layers").json["layers"]
    found = {
        layer: {part["source"]: round(part["coefficient"], 4) for part in one["parts"]} for layer, one in layers.items()
    }
    assert found == {str(n): {"french:v1": 0.5 + 0.5 * n, "law:v1": 0.25} for n in range(3)}
    assert max(one["residual"] for one in layers.values()) < 3e-7
    text = run("explain", "slope:v1", "--layers").out.splitlines()
    assert text[0].split() == ["LAYER", "french:v1", "law:v1", "RESIDUAL"]
    assert [line.split()[0:3] for line in text[1:]] == [["0", "0.5", "0.25"], ["1", "1", "0.25"], ["2", "1.5", "0.25"]]


BAD = [
    ("explain nothing:v1", 3, "nothing:v1"),
    ("explain ./nothing", 3, "nothing"),
    ("explain blend:v1 --among nothing:v1", 3, "nothing:v1"),
    ("explain blend:v1 --most 0", 2, "--most"),
    ("explain hf://me/x", 2, "a URL"),
    ("explain", 2, "SOURCE"),
    ("explain blend:v1 law:v1", 2, "law:v1"),
]


@pytest.mark.parametrize(("command", "code", "says"), BAD, ids=[row[0] for row in BAD])
def test_bad_input_is_refused_in_one_line(registry, run, command, code, says):
    ran = run(*command.split())
    assert (ran.code, says in ran.err, ran.err.count("\n"), ran.out) == (code, True, 1, ""), ran.err


def test_with_nothing_to_explain_by(run, tmp_path):
    lf.save(drawn(1), tmp_path / "alone")
    for options in ((), ("--layers",)):
        ran = run("explain", tmp_path / "alone", *options)
        assert (ran.code, "name some" in ran.err) == (2, True)
