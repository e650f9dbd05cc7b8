"""Recipes that are none: exit 2, the file's line and column in front, nothing written, no lock."""

import shutil
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import loraforge as lf
from loraforge.errors import RecipeError
from loraforge.recipe._nodes import read_nodes
from loraforge.recipe._schema import read_document
from tests.bad_files import config, tensors, write_adapter
from tests.strategies import mutated

MARK = "§"
GOOD = """\
recipe: 1
inputs:
  french: french:v1
  law: ./law
steps:
  blend:
    from:
      - {adapter: french, weight: 0.7, include: [q]}
      - adapter: law
        weight: [0.5, 1]
        exclude: v
  small:
    method: rerank
    from: blend
    rank: 2
result: small
"""


def with_(old: str, new: str) -> str:
    """The good recipe with a change; what is wrong stands behind the mark."""
    assert old in GOOD
    return GOOD.replace(old, new, 1)


def small(fields: str) -> str:
    """The good recipe with other fields of its step ``small``."""
    return with_("    method: rerank\n    from: blend\n    rank: 2", fields)


RERANK = "    §method: rerank\n    from: blend\n"
BOTH = "inputs:\n  french: french:v1\n  law: ./law"
LAUGHS = "recipe: 1\ninputs:\n  a0: §&a0 [lol]\n" + "".join(
    f"  a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 30)
)
TERM = "{adapter: french, weight: 0.7, include: [q]}"

# name: (text, a fragment of the message)
CASES: dict[str, tuple[str | bytes, str]] = {
    "empty": (MARK, "is empty"),
    "a comment only": ("§# nothing here\n", "is empty"),
    "a list": ("§- recipe\n", "a recipe is a list"),
    "a text": ("§recipe\n", "a recipe is the text"),
    "no inputs": ("§recipe: 1\nresult: x\n", "without 'inputs'"),
    "no result": ("§" + GOOD.replace("result: small\n", ""), "without 'result'"),
    "no recipe": ("§" + GOOD.replace("recipe: 1\n", ""), "without 'recipe'"),
    "a newer recipe": (with_("recipe: 1", "recipe: §2"), "recipe is 2"),
    "a version in quotes": (with_("recipe: 1", 'recipe: §"1"'), "text in quotes"),
    "an unknown field": (with_("steps:", "§stesp:"), "did you mean 'steps'"),
    "a field twice": (GOOD + "§result: blend\n", "stands twice; first in line 16"),
    "an input twice": (with_("  law: ./law", "  law: ./law\n  §french: law:v1"), "stands twice; first in line 3"),
    "a step twice": (with_("  small:", "  §blend:"), "stands twice"),
    "an anchor": (with_("french: french:v1", "french: §&a french:v1"), "an anchor"),
    "an alias": (with_("./law", "§*a"), "an alias"),
    "billions of laughs": (LAUGHS, "an anchor"),
    "a tag": (with_("french: french:v1", "french: §!!str french:v1"), "a tag"),
    "a tag that constructs": (with_("./law", "§!!python/object/apply:os.system [id]"), "a tag"),
    "a merge key": (with_("  law: ./law", "  §<<: {law: ./law}"), "without quotes"),
    "a second document": (GOOD + "§---\nrecipe: 1\n", "a second document"),
    "a directive": ("§%YAML 1.1\n---\n" + GOOD, "a directive"),
    "a directive of another version": ("§%YAML 2.0\n---\n" + GOOD, "not YAML"),
    "a tab": (with_("  law: ./law", "§\tlaw: ./law"), "not YAML"),
    "an open bracket": (with_("include: [q]}", "include: [q§}"), "not YAML"),
    "an open quote": (GOOD.replace("result: small\n", "result: 'small\n§"), "not YAML"),
    "wrong indentation": (with_("    rank: 2", "   §rank: 2"), "not YAML"),
    "not UTF-8": (GOOD.replace("./law", "./l§\xe9").encode("latin-1"), "not UTF-8: the byte 0xe9"),
    "a control character": (with_("./law", "./l§\x07aw"), "U+0007 is not allowed"),
    "a NUL": (with_("./law", "./l§\0aw"), "U+0000 is not allowed"),
    "too deep": ("recipe: " + "[" * 11 + "§[" + "[" * 100000, "nested deeper than 12"),
    "too large": ("§# " + "x" * 300_000 + "\n" + GOOD, "bytes; the limit is"),
    "a list as a key": (with_("  law: ./law", "  ? §[law]\n  : ./law"), "a key that is a list"),
    "no as an input": (with_("./law", "§no"), 'write "no"'),
    "no as a name": (with_("law: ./law", "§no: ./law"), 'write "no"'),
    "a number as a name": (with_("law: ./law", "§1e3: ./law"), 'write "1e3"'),
    "nothing as a name": (with_("law: ./law", "§~: ./law"), "without quotes"),
    "a time as an input": (with_("./law", "§12:30:45"), 'write "12:30:45"'),
    "a date as an input": (with_("./law", "§2026-11-25"), "without quotes"),
    "nothing as an input": (with_("law: ./law", "law:§"), "nothing here"),
    "a mapping as an input": (with_("./law", "§{path: ./law}"), "a mapping; expected a reference or a path"),
    "a path that climbs": (with_("./law", "§../law"), "is outside"),
    "a path that climbs and returns": (with_("./law", "§./law/../../home/../elsewhere/x"), "is outside"),
    "a path that begins at the root": (with_("./law", "§/etc/law"), "(--root DIR)"),
    "a path that begins at home": (with_("./law", "§~/law"), "nothing is put in for ~"),
    "a path that begins at somebody's home": (with_("./law", "§~root/law"), "nothing is put in for ~root"),
    "a path that begins with a variable": (with_("./law", "§$HOME/law"), "nothing is put in for $HOME"),
    "a path through a link": (with_("./law", "§./link/law"), "is outside"),
    "a path as a URL": (with_("./law", "§file:///etc/law"), "is a URL"),
    "a URL as an input": (with_("./law", "§hf://me/law"), "pull it into the store first"),
    "a reference that cannot be one": (with_("./law", "§Law:v1"), "is not a name"),
    "a name with a space": (with_("law: ./law", "§the law: ./law"), "is not a name"),
    "a name that is too long": (with_("law: ./law", f"§{'x' * 65}: ./law"), "is not a name"),
    "inputs as a list": (with_(BOTH, "inputs: §[french, law]"), "inputs is a list"),
    "inputs that are empty": (with_(BOTH, "inputs: §{}"), "an empty mapping"),
    "an octal weight": (with_("0.7", "§0777"), "expected a number in decimals"),
    "a hexadecimal weight": (with_("0.7", "§0x1F"), "expected a number in decimals"),
    "a sexagesimal weight": (with_("0.7", "§1:30"), "expected a number in decimals"),
    "a weight with underscores": (with_("0.7", "§1_000"), "expected a number in decimals"),
    "a weight in quotes": (with_("0.7", "§'0.7'"), "text in quotes"),
    "a weight that is yes": (with_("0.7", "§yes"), "expected a number in decimals"),
    "a weight that is nothing": (with_("0.7", "§null"), "expected a number in decimals"),
    "an infinite weight": (with_("0.7", "§.inf"), "expected a number in decimals"),
    "a weight that is no number": (with_("0.7", "§.nan"), "expected a number in decimals"),
    "a weight beyond float64": (with_("0.7", "§1e999"), "beyond the numbers"),
    "an empty gradient": (with_("[0.5, 1]", "§[]"), "expected a list of numbers"),
    "a weight of 10^308": (
        with_(TERM, "french").replace("[0.5, 1]", "1e308").replace("./law", "law:v1").replace("  blend:", "  §blend:"),
        "beyond any use",
    ),
    "ten thousand models and one more": (
        "recipe: 1\ninputs: {french: french:v1}\nsteps:\n  blend:\n    from:\n      §- french\n"
        + "      - french\n" * 10_000 + "result: blend\n",
        "10001 terms",
    ),
    "a density": (with_("  blend:", "  blend:\n    §density: 0"), "has no field 'density'"),
    "a place between two": (with_("  blend:", "  blend:\n    §t: 1.5"), "has no field 't'"),
    "a method for spheres": (with_("  blend:", "  blend:\n    method: §slerp"), "there is no method 'slerp'"),
    "code": (with_("result:", "§python: print(1)\nresult:"), "has no field 'python'"),
    "a hook": (with_("  blend:", "  blend:\n    §before: rm -rf x"), "has no field 'before'"),
    "remote code": (with_("result:", "§trust_remote_code: true\nresult:"), "has no field 'trust_remote_code'"),
    "a template": (with_("0.7", "$§{WEIGHT}"), "not YAML"),
    "a template as a name": (with_("french:v1", "{§{name}}"), "a key that is a"),
    "a gradient of words": (with_("[0.5, 1]", "[0.5, §high]"), "expected a number in decimals"),
    "a gradient of lists": (with_("[0.5, 1]", "[0.5, §[1]]"), "a list; expected a number"),
    "a rank that is no whole number": (with_("rank: 2", "rank: §2.5"), "expected a whole number"),
    "a rank as a float": (with_("rank: 2", "rank: §1e1"), "expected a whole number"),
    "an octal rank": (with_("rank: 2", "rank: §010"), "expected a whole number"),
    "a negative rank": (with_("rank: 2", "rank: §-2"), "expected 0 to"),
    "a huge rank": (with_("rank: 2", f"rank: §{'9' * 50}"), "expected 0 to"),
    "a rank of zero": (small(RERANK + "    rank: 0"), "rank is 0"),
    "two criteria": (small(RERANK + "    rank: 2\n    energy: 0.9"), "say exactly one"),
    "no criterion": (small(RERANK[:-1]), "say exactly one"),
    "an energy above 1": (small(RERANK + "    energy: 1.5"), "energy is 1.5"),
    "a flag that is yes": (with_("  blend:", "  blend:\n    drop_saved: §yes"), "expected true or false"),
    "an unknown method": (with_("method: rerank", "method: §rerun"), "did you mean 'rerank'"),
    "a field of another method": (with_("  blend:", "  blend:\n    §rank: 2"), "has no field 'rank'"),
    "the command line's spelling": (with_("rank: 2", "§max-parameters: 2"), "did you mean 'max_parameters'"),
    "a step that is a text": (small("    §blend"), "expected a mapping with 'from'"),
    "a step from nothing": (small("    §method: rerank\n    rank: 2"), "without 'from'"),
    "a sum from one name": (small("    from: §blend"), "expected a list of terms"),
    "a sum of nothing": (small("    from: §[]"), "expected a list of terms"),
    "a re-rank of two": (with_("from: blend", "from: §[blend, law]"), "expected its name"),
    "an unknown field of a term": (with_("weight: 0.7", "§wieght: 0.7"), "did you mean 'weight'"),
    "a term without an adapter": (with_(TERM, "§{weight: 1}"), "without 'adapter'"),
    "a term that is a list": (with_(TERM, "§[french]"), "a term is a list"),
    "an unknown adapter": (with_(TERM, "§frnech"), "did you mean 'french'"),
    "a step of itself": (with_(TERM, "§blend"), "a circle"),
    "a circle": (small("    from: [medium]\n  medium: {from: [§small]}"), "a circle"),
    "a step called as an input": (with_("  small:", "  §law:"), "is an input already"),
    "a step called result": (with_("  small:", "  §result:"), "is the result already"),
    "an input as the result": (with_("result: small", "result: §law"), "is an input"),
    "an unknown result": (with_("result: small", "result: §smal"), "did you mean 'small'"),
    "a result that is a list": (with_("result: small", "result: §[small]"), "the result is a list"),
    "an empty filter": (with_(TERM, "§{adapter: french, include: []}"), "include is empty"),
    "a filter of numbers": (with_("[q]", "[§1]"), 'write "1"'),
    "a filter that is no pattern": (with_(TERM, "§{adapter: french, include: '(q'}"), "is not a regular expression"),
    "a filter that matches nothing": (with_(TERM, "§{adapter: french, include: [k]}"), "the adapter has 'q', 'v'"),
    "a pattern that matches nothing": (with_(TERM, "§{adapter: french, include: '.*k'}"), "matches no target"),
    "a filter that leaves nothing": (with_(TERM, "§{adapter: french, exclude: '.*[qv]'}"), "leaves out every"),
    "a filter that leaves out nothing": (with_(TERM, "§{adapter: french, exclude: '.*k'}"), "matches no target"),
    "no layers": (with_("result:", "layers: §0\nresult:"), "expected 1 to"),
    "a part of a layer": (with_("result:", "layers: §1.5\nresult:"), "expected a whole number"),
    "another shape": (with_("  blend:", "  §blend:").replace("./law", "./wide"), "belong to different bases"),
    "another base": (with_("  blend:", "  §blend:").replace("./law", "./foreign"), "name different bases"),
    "whole saved tensors": (with_("./law", "./saved").replace("- adapter", "- §adapter"), "(drop_saved)"),
}  # fmt: skip


# What is asked of a recipe from a stranger, and which cases ask it.
ROWS = {
    "A41": ("a tag", "a tag that constructs"),
    "A42": ("billions of laughs", "an anchor", "an alias"),
    "A43": ("a field twice", "no as an input", "an octal rank", "a weight with underscores", "a time as an input",
            "a merge key", "a second document", "a tab"),
    "A44": ("a path that climbs", "a path that climbs and returns", "a path that begins at the root",
            "a path that begins at home", "a path that begins with a variable", "a path through a link",
            "a path as a URL"),
    "A45": ("a weight that is no number", "an infinite weight", "a weight of 10^308", "a weight in quotes",
            "a density", "a place between two", "ten thousand models and one more", "a circle",
            "an unknown method", "an unknown field of a term"),
    "A47": ("code", "a hook", "remote code", "a template", "a template as a name"),
}  # fmt: skip


def test_what_is_asked_is_tried():
    assert {name for names in ROWS.values() for name in names} <= set(CASES)


@pytest.fixture(scope="module")
def made_once(tmp_path_factory):
    """A store with french:v1, and directories beside the recipe."""
    home = tmp_path_factory.mktemp("home")
    write_adapter(home / "french", settings=config(base_model_name_or_path="some/base"))
    write_adapter(home / "law", weights=tensors(-0.25))
    write_adapter(home / "wide", weights=tensors(columns=8))
    write_adapter(home / "foreign", settings=config(base_model_name_or_path="other/base"))
    extra = {"base_model.model.lm_head.weight": ("F32", (1, 1), b"\0\0\x80?")}
    write_adapter(home / "saved", weights=tensors() | extra, settings=config(modules_to_save=["lm_head"]))
    (home / "link").symlink_to("..")
    lf.Registry(home / "store").push(home / "french", "french:v1")
    lf.Registry(home / "store").push(home / "law", "law:v1")
    return home


@pytest.fixture
def home(made_once, tmp_path, monkeypatch):
    shutil.copytree(made_once, tmp_path / "home", symlinks=True)
    monkeypatch.chdir(tmp_path / "home")
    monkeypatch.setenv("LORAFORGE_STORE", str(tmp_path / "home" / "store"))
    return tmp_path / "home"


def contents(home: Path) -> dict[str, bytes]:
    """Every file, but for the cache that may change at any moment."""
    return {str(path): path.read_bytes() for path in home.rglob("*") if path.is_file() and path.name != "index.sqlite"}


def test_the_good_recipe_is_good(home, run):
    (home / "blend.yaml").write_text(GOOD)
    made = run("compose", "blend.yaml", "--as", "blend:v1")
    assert (made.code, made.err) == (0, "")
    assert (home / "blend.lock").exists()


@pytest.mark.parametrize("name", CASES)
def test_a_bad_recipe_is_refused_at_its_place_and_nothing_is_written(name, home, run):
    given_, says = CASES[name]
    mark = MARK.encode("latin-1") if isinstance(given_, bytes) else MARK.encode()
    data = given_ if isinstance(given_, bytes) else given_.encode()
    before, found, after = data.partition(mark)
    assert found, "a case says where it is wrong"
    line, column = before.count(b"\n") + 1, len(before) - (before.rfind(b"\n") + 1) + 1
    (home / "blend.yaml").write_bytes(before + after)
    kept = contents(home)
    start = time.perf_counter()
    ran = run("compose", "blend.yaml", "--as", "blend:v1")
    assert time.perf_counter() - start < 60, "a hang, not a slow machine"
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith(f"loraforge: blend.yaml:{line}:{column}: "), ran.err
    assert says in ran.err
    assert ran.err.count("\n") == 1
    assert contents(home) == kept


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "lock: 1", '{"lock": 1}', '{"lock": 2, "inputs": {}}', '{"lock": true, "inputs": {}}',
        '{"lock": 1, "inputs": []}', '{"lock": 1, "inputs": {"french": 1}}',
        '{"lock": 1, "inputs": {"french": {"source": "french:v1"}}}',
        '{"lock": 1, "inputs": {"french": {"source": 1, "digest": "x", "content_id": "y"}}}',
        '{"lock": 1, "inputs": {"french": {"source": "french:v1", "digest": "sha256:00", "content_id": "sha256:00"}}}',
        '{"lock": 1, "inputs": {}, "inputs": {}}', "[[package]]\nname = \"poetry's\"\n",
    ],
)  # fmt: skip
def test_a_bad_lock_is_refused_and_left_alone(text, home, run):
    (home / "blend.yaml").write_text(GOOD)
    (home / "blend.lock").write_text(text)
    kept = contents(home)
    ran = run("compose", "blend.yaml", "--as", "blend:v1")
    assert ran.code == 2
    assert "blend.lock: not a lock" in ran.err
    assert contents(home) == kept


def test_what_a_recipe_says_itself_is_no_option(home, run):
    (home / "blend.yaml").write_text(GOOD)
    for options in (["--rank", "2"], ["--drop-saved"], ["--method", "linear"], ["--base", "x"], ["french:v1"]):
        ran = run("compose", "blend.yaml", *options, "--as", "blend:v1")
        assert (ran.code, "recipe" in ran.err) == (2, True), ran.err
    assert run("compose", "french:v1", "--update", "--as", "x").code == 2
    assert run("compose", "missing.yaml", "--as", "x").code == 3
    assert not (home / "blend.lock").exists()


@given(mutated(st.just(GOOD.encode())))
def test_damaged_recipes_are_read_or_refused_with_a_place(data):
    try:
        read_document(read_nodes(data, "r.yaml"))
    except RecipeError as error:
        file, line, column, _ = str(error).split(":", 3)
        assert file == "r.yaml"
        assert int(line) >= 1
        assert int(column) >= 1


def test_another_root_lets_paths_climb(home, run):
    (home / "deep").mkdir()
    (home / "deep" / "blend.yaml").write_text(GOOD.replace("./law", "../law"))
    refused = run("compose", "deep/blend.yaml", "--as", "blend:v1")
    assert refused.err.startswith("loraforge: deep/blend.yaml:4:8: '../law' is outside deep")
    assert run("compose", "deep/blend.yaml", "--root", home, "--as", "blend:v1").code == 0
    assert run("compose", "deep/blend.yaml", "--root", home / "deep", "--as", "blend:v1").code == 2
    assert run("compose", "deep/blend.yaml", "--root", home / "nowhere", "--as", "blend:v1").code == 3
    (home / "deep" / "blend.yaml").write_text(GOOD.replace("./law", f"{home}/law"))
    assert run("compose", "deep/blend.yaml", "--root", home, "--update", "--as", "blend:v2").code == 0
    assert run("compose", "french:v1", "--root", home, "--as", "x").code == 2


def test_a_recipe_in_the_store_is_refused(home, run):
    """Row A46: nothing is written where an input or the store lies."""
    (home / "store" / "blend.yaml").write_text(GOOD)
    refused = run("compose", "store/blend.yaml", "--as", "blend:v1")
    assert (refused.code, "where only the store writes" in refused.err) == (2, True)
    assert not (home / "store" / "blend.lock").exists()


def test_weights_that_add_up_to_nothing_are_a_difference(home, run):
    """Row A45: nothing is divided by their sum."""
    (home / "blend.yaml").write_text(
        "recipe: 1\ninputs: {french: french:v1, law: ./law}\nsteps:\n"
        "  blend: {from: [{adapter: french, weight: 1}, {adapter: law, weight: -1}]}\nresult: blend\n"
    )
    made = lf.Recipe.load("blend.yaml").preview().adapter
    french, law = lf.load("french:v1"), lf.load("./law")
    for name, pair in made.targets.items():
        assert (pair.delta() - (french.targets[name].delta() - law.targets[name].delta())).abs().max() < 1e-6


def test_a_name_in_quotes_is_a_name(home):
    text = GOOD.replace("law: ./law", '"no": ./law').replace("adapter: law", 'adapter: "no"')
    (home / "blend.yaml").write_text(text)
    assert lf.Recipe.load("blend.yaml").preview().adapter.targets


def test_numbers_are_read_in_every_honest_spelling(home):
    for text, value in (("1e3", 1000.0), ("-1.5E-2", -0.015), (".5", 0.5), ("+2", 2.0), ("3.", 3.0), ("-0", 0.0)):
        (home / "blend.yaml").write_text(GOOD.replace("0.7", text))
        assert lf.Recipe.load("blend.yaml").document.steps["blend"].terms[0].weight == value
