"""What the pages in docs/ say is so: every file is written, every command run, every line of output looked for."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch

import loraforge as lf
from tests.unit.recipe.adapters import drawn

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
EXIT = re.compile(r"\s+# exit (\d)$")
FEW = 4  # samples of each task


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORAFORGE_STORE", str(tmp_path / "store"))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(before)


def follow(page, run, home, python):
    """Run a page from its first block to its last; return how many commands it has."""
    commands = 0
    for kind, text in BLOCK.findall((DOCS / page).read_text()):
        if kind == "yaml":
            path = home / text.partition("\n")[0].removeprefix("# ")
            path.parent.mkdir(exist_ok=True)
            path.write_text(text.partition("\n")[2])
        elif kind == "console":
            commands += check(text, run, home)
        elif kind == "python":
            exec(compile(text, page, "exec"), python)  # noqa: S102 - our own page
    return commands


def check(block, run, home):
    asked = [part for part in re.split(r"^\$ ", block, flags=re.MULTILINE) if part]
    for part in asked:
        command, _, said = part.partition("\n")
        wanted = EXIT.search(command)
        words = shlex.split(EXIT.sub("", command).replace("file:team", (home / "team").as_uri()))
        assert words[0] == "loraforge"
        ran = run(*words[1:])
        assert ran.code == (int(wanted[1]) if wanted else 0), (command, ran.err)
        for line in said.splitlines():
            pattern = r"\s*".join(re.escape(word).replace("…", r"[0-9a-f]+") for word in line.split())
            assert re.search(pattern, ran.out + ran.err), (command, line, ran.out, ran.err)
    return len(asked)


def test_recipes(run, home):
    registry = lf.Registry(home / "store")
    registry.push(drawn(1), "french:v1")
    registry.push(drawn(2), "law:v1")
    lf.save(drawn(3), home / "theirs")
    python = {}
    assert follow("recipes.md", run, home, python) == 14
    assert lf.rebuild("blend:v3").same


@pytest.mark.filterwarnings("ignore")  # transformers' own remarks
def test_trees(run, home):
    from transformers import AutoModelForCausalLM

    from tests.cli.test_train import make_base
    from tests.cli.test_tree import write_lines

    make_base(home / "base")
    for letter, name in zip("abc", ("french", "law", "medicine"), strict=True):
        write_lines(home / f"{name}.jsonl", letter)
    (home / "team").mkdir()
    theirs = {
        "model.layers.0.self_attn.q_proj": lf.LowRank(
            "linear", torch.randn(2, 32), torch.randn(32, 2) * 0.01, alpha=2.0
        )
    }
    lf.save(lf.Adapter(theirs), home / "theirs")
    python = {"model": AutoModelForCausalLM.from_pretrained(home / "base", dtype="auto")}
    assert follow("trees.md", run, home, python) == 23
    nodes = home / "nodes"
    assert {str(p.parent.relative_to(nodes)) for p in nodes.rglob("*.safetensors")} == {"stranger", "stranger/law"}
    assert set(json.loads(run("--store", "part", "--json", "tree", "show", "law-tree").out)["nodes"]) == {
        "stranger",
        "stranger/law",
    }


def test_the_readme_links_every_page():
    readme = (DOCS.parent / "README.md").read_text()
    assert [page.name for page in DOCS.glob("*.md") if f"docs/{page.name}" not in readme] == []
