"""Pushes to a hub: one commit, compared, then the tag; only what is missing goes over the wire."""

import io
import json
from pathlib import Path

import pytest

from loraforge_registry.digest import Digest
from loraforge_registry.remotes import http
from loraforge_registry.remotes.card import with_front_matter
from loraforge_registry.store import Store
from tests.bad_files import config, pair, tensors, write_adapter
from tests.hostile_hub import TOKEN, running_hub

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
REPO = "hf://me/french"
OURS = {CONFIG, WEIGHTS, "README.md", "loraforge.json"}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setattr(http, "PAUSES", (0.0,) * 3)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # which peers' tests set
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    with running_hub() as found:
        monkeypatch.setenv("HF_ENDPOINT", found.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield found
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


@pytest.fixture
def adapter(run, tmp_path) -> Path:
    """An adapter for a base on the Hub, named french:v1."""
    settings = config(base_model_name_or_path="acme/base", revision="abc")
    path = write_adapter(tmp_path / "french", settings=settings)
    run("push", path, "french:v1")
    return path


def commits(hub) -> int:
    return len(hub.repos["me/french"].commits)


def refused(run, *arguments: object, code: int = 5, kind: str = "remote") -> str:
    """Push what must be refused; return the sentence."""
    ran = run("--json", "push", *arguments, "--to", REPO)
    assert (ran.code, ran.json["error"]["kind"]) == (code, kind), ran
    assert TOKEN not in ran.out + ran.err
    return ran.json["error"]["message"]


def test_one_commit_and_a_tag(hub, adapter, run):
    ran = run("--json", "push", "french:v1", "--to", REPO)
    repo = hub.repos["me/french"]
    assert ran.json["remote"] == f"{REPO}@v1"
    assert set(repo.head) == OURS | {".gitattributes"}
    assert commits(hub) == 2  # the repository began with one
    assert repo.tags == {"v1": repo.branches["main"]}
    assert repo.head[WEIGHTS] == (adapter / WEIGHTS).read_bytes()
    assert repo.head[CONFIG] == (adapter / CONFIG).read_bytes()
    assert ran.json["sent"] == sum(len(repo.head[name]) for name in OURS)
    assert hub.count("POST .*/commit/") == 1


def test_a_second_push_sends_nothing(hub, adapter, run):
    run("push", "french:v1", "--to", REPO)
    for name in ("french:v1", "french", "french:v2"):
        run("tag", "french:v1", name)
        hub.requests.clear()
        again = run("--json", "push", name, "--to", REPO)
        assert (again.json["sent"], hub.count("POST .*(commit|preupload|batch)|PUT")) == (0, 0), name
    assert commits(hub) == 2
    assert set(hub.repos["me/french"].tags) == {"v1", "v2"}


def test_what_comes_back_is_the_same(hub, adapter, run, monkeypatch, tmp_path):
    here = run("--json", "push", "french:v1", "--to", REPO).json
    monkeypatch.setenv("LORAFORGE_STORE", str(tmp_path / "other"))
    there = run("--json", "pull", f"{REPO}@v1").json
    assert {key: there[key] for key in ("digest", "content_id", "files")} == {
        key: here[key] for key in ("digest", "content_id", "files")
    }


def test_straight_from_a_directory(hub, adapter, run):
    ran = run("--json", "push", adapter, "mine:v3", "--to", REPO).json
    assert (ran["name"], ran["tag"], ran["remote"]) == ("mine", "v3", f"{REPO}@v3")


def test_a_private_repository(hub, adapter, run):
    assert run("push", "french:v1", "--to", REPO, "--private").code == 0
    assert hub.repos["me/french"].private


def test_a_branch_and_a_tag_in_the_url(hub, adapter, run):
    run("push", "french:v1", "--to", f"{REPO}@first")
    repo = hub.repos["me/french"]
    assert set(repo.tags) == {"first"}
    repo.branches["dev"] = repo.branches["main"]
    run("push", write_adapter(adapter.parent / "b", weights=tensors(0.75)), "b:v1", "--to", f"{REPO}@dev")
    assert repo.branches["dev"] != repo.branches["main"]
    assert set(repo.tags) == {"first"}


def test_a_tag_that_is_taken(hub, adapter, run):
    run("push", "french:v1", "--to", REPO)
    other = write_adapter(adapter.parent / "b", weights=tensors(0.75))
    before = hub.repos["me/french"].branches["main"]
    assert "choose another tag" in refused(run, other, "b:v1", code=4, kind="conflict")
    assert hub.repos["me/french"].branches["main"] == before
    assert run("push", other, "b:v1", "--to", REPO, "--force").code == 0
    assert hub.repos["me/french"].tags["v1"] == hub.repos["me/french"].branches["main"] != before


def test_a_branch_that_moves_meanwhile(hub, adapter, run):
    run("push", "french:v1", "--to", REPO)
    repo = hub.repos["me/french"]
    hub.spoil("POST .*/preupload", lambda _: (repo.commit({**repo.head, "notes.txt": b"mine"}), False)[1])
    other = write_adapter(adapter.parent / "b", weights=tensors(0.75))
    assert "moved on while this was pushed" in refused(run, other, "b:v2", code=4, kind="conflict")
    assert repo.head["notes.txt"] == b"mine"
    assert set(repo.tags) == {"v1"}
    hub._spoilers.clear()
    ran = run("--json", "push", "b:v2", "--to", REPO)
    assert (ran.code, repo.head["notes.txt"]) == (0, b"mine")
    assert "notes.txt" in ran.err


def test_a_push_that_was_cut_sends_only_the_rest(hub, tmp_path, run):
    path = write_adapter(
        tmp_path / "a", weights=pair("model.layers.0.q", rows=3000, columns=3000), settings=config(target_modules=["q"])
    )
    hub.spoil("POST .*/commit/", lambda handler: handler.reply(403))
    assert "not allowed" in refused(run, path, "french:v1")
    assert hub.uploaded == len((path / WEIGHTS).read_bytes())
    hub._spoilers.clear()
    ran = run("--json", "push", "french:v1", "--to", REPO).json
    assert hub.uploaded == len((path / WEIGHTS).read_bytes())
    assert ran["sent"] < 10_000 < ran["skipped"]
    hub.spoil("POST .*/tag/", lambda handler: handler.reply(403))
    run("tag", "french:v1", "french:v2")
    assert "not allowed" in refused(run, "french:v2")
    hub._spoilers.clear()
    assert run("--json", "push", "french:v2", "--to", REPO).json["sent"] == 0
    assert set(hub.repos["me/french"].tags) == {"v1", "v2"}


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_push_that_breaks_off_at_any_request_is_run_again(when, hub, adapter, run, monkeypatch):
    """The connection ends before the hub does what was asked, or before it can say that it did."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    requests = 0
    for number in range(100):
        hub.repos.clear()
        hub.lfs.clear()
        hub.requests.clear()
        hub._spoilers.clear()

        def break_off(handler, at=number):
            if len(hub.requests) != at + 1:
                return False
            handler.close_connection = True
            handler.wfile = io.BytesIO()
            return when == "before"

        hub.spoil(".", break_off)
        ran = run("push", "french:v1", "--to", REPO)
        requests = len(hub.requests)
        if requests <= number:
            break
        hub._spoilers.clear()
        assert ran.code in (0, 5), ran
        assert run("push", "french:v1", "--to", REPO).code == 0, number
        repo = hub.repos["me/french"]
        assert (set(repo.head), commits(hub)) == (OURS | {".gitattributes"}, 2), number
        assert repo.tags == {"v1": repo.branches["main"]}
    assert requests > 8


def test_an_upload_that_is_refused(hub, adapter, run):
    hub.spoil("PUT", lambda handler: handler.reply(403))
    assert "not allowed" in refused(run, "french:v1")
    assert commits(hub) == 1


def test_a_hub_that_keeps_other_bytes(hub, adapter, run):
    def spoil(handler):
        repo = handler.hub.repos.get("me/french")
        if repo is not None and WEIGHTS in repo.head:
            repo.head[WEIGHTS] = repo.head[WEIGHTS][:-1] + b"!"
        return False

    hub.spoil("GET .*/revision/", spoil)
    assert "did not arrive as sent" in refused(run, "french:v1")
    assert hub.repos["me/french"].tags == {}


def test_a_damaged_store_sends_nothing(hub, adapter, run):
    store = Store()
    digest = store.manifest(store.resolve("french:v1")).file(WEIGHTS).digest
    path = store.path / "blobs" / "sha256" / digest.hex[:2] / digest.hex
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert "damaged" in refused(run, "french:v1", kind="bad_store")
    assert hub.uploaded == 0


def test_who_may_not(hub, adapter, run, monkeypatch):
    ran = run("--json", "push", "french:v1", "--to", "hf://others/french")
    assert (ran.code, "you may not write here" in ran.json["error"]["message"]) == (5, True)
    monkeypatch.delenv("HF_TOKEN")
    assert "hf auth login" in refused(run, "french:v1")


def test_a_hub_that_sends_the_token_back(hub, adapter, run):
    hub.spoil("POST", lambda handler: handler.refuse(403, "x", handler.headers["Authorization"]))
    assert "<token>" in refused(run, "french:v1")


def test_nobody_there(adapter, run, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert "cannot be reached" in refused(run, "french:v1")


def test_another_model_is_not_written_over(hub, adapter, run):
    hub.add("me/french", {"config.json": b"{}", "model.safetensors": b"w"})
    assert "and no adapter" in refused(run, "french:v1", code=4, kind="conflict")
    assert run("push", "french:v1", "--to", REPO, "--force").code == 0
    assert "config.json" in hub.repos["me/french"].head


# README.md


def test_the_card_says_what_is_known(hub, adapter, run):
    run("push", "french:v1", "--to", REPO)
    text = hub.repos["me/french"].head["README.md"].decode()
    digest = str(Store().resolve("french:v1"))
    front = text.split("---\n")[1]
    assert 'base_model: "acme/base"\nbase_model_relation: adapter\n' in front
    assert "library_name: peft" in front
    assert '- "lora"\n- "base_model:adapter:acme/base"' in front
    for fact in (digest, "| rank | 2 |", "`q`, `v`", 'PeftModel.from_pretrained(base, "me/french")'):
        assert fact in text


def test_lineage_is_on_the_card(hub, run, tmp_path):
    for name, value in (("a", 0.5), ("b", 0.75)):
        run("push", write_adapter(tmp_path / name, weights=tensors(value)), f"{name}:v1")
    run("compose", "a:v1=0.25", "b:v1=0.75", "--as", "mix:v1")
    run("push", "mix:v1", "--to", REPO)
    text = hub.repos["me/french"].head["README.md"].decode()
    assert f"- 0.25 x `{Store().resolve('a:v1')}`" in text


def test_a_base_on_somebodys_disk_is_not_named(hub, run, tmp_path):
    settings = config(base_model_name_or_path="/home/me/secret/base")
    run("push", write_adapter(tmp_path / "a", settings=settings), "a:v1", "--to", REPO)
    assert b"/home/me" not in hub.repos["me/french"].head["README.md"]


README = b"# My adapter\n\nby hand\n"
FRONT = b"---\nlicense: mit\n---\n\n# My adapter\n"


@pytest.mark.parametrize("readme", [README, FRONT, b"", b"\xff\xfe"])
def test_a_readme_of_the_adapter_is_kept(readme, hub, adapter, run, monkeypatch, tmp_path):
    (adapter / "README.md").write_bytes(readme)
    if readme == b"\xff\xfe":
        assert "UTF-8" in refused(run, adapter, "own:v1", code=2, kind="bad_format")
        return
    pushed = run("--json", "push", adapter, "own:v1", "--to", REPO)
    there = hub.repos["me/french"].head["README.md"]
    assert there.endswith(readme)
    assert (there == readme) == (readme == FRONT)
    assert ("does not name base_model" in pushed.err) == (readme == FRONT)
    monkeypatch.setenv("LORAFORGE_STORE", str(tmp_path / "other"))
    assert run("--json", "pull", f"{REPO}@v1").json["digest"] == pushed.json["digest"]
    assert run("pull", "french:v1", "--to", tmp_path / "out").code == 0
    assert (tmp_path / "out" / "README.md").read_bytes() == readme


def test_what_a_person_wrote_on_the_hub_stays(hub, adapter, run):
    run("push", "french:v1", "--to", REPO)
    repo = hub.repos["me/french"]
    repo.commit({**repo.head, "README.md": b"edited on the hub"})
    other = write_adapter(adapter.parent / "b", weights=tensors(0.75))
    ran = run("--json", "push", other, "b:v2", "--to", REPO)
    assert (ran.code, repo.head["README.md"]) == (0, b"edited on the hub")
    assert "kept as it is" in ran.err
    assert run("--json", "push", other, "b:v2", "--to", REPO).json["sent"] == 0
    assert run("--json", "pull", REPO, "--as", "c:v1").json["digest"] == ran.json["digest"]
    (other / "README.md").write_bytes(README)
    assert "--force replaces it" in refused(run, other, "b:v3", code=4, kind="conflict")
    assert repo.head["README.md"] == b"edited on the hub"
    assert run("push", other, "b:v3", "--to", REPO, "--force").code == 0
    assert repo.head["README.md"].endswith(README)


def test_a_readme_edited_on_the_hub_makes_another_artifact(hub, adapter, run):
    (adapter / "README.md").write_bytes(README)
    pushed = run("--json", "push", adapter, "own:v1", "--to", REPO).json
    repo = hub.repos["me/french"]
    repo.commit({**repo.head, "README.md": b"edited"})
    pulled = run("--json", "pull", REPO, "--as", "new:v1")
    assert pulled.json["content_id"] == pushed["content_id"]
    assert pulled.json["digest"] != pushed["digest"]
    assert "was edited since it was pushed" in pulled.err
    store = Store()
    readme = next(f for f in store.manifest(Digest.parse(pulled.json["digest"])).files if f.path == "README.md")
    assert store.read_file(readme, 100) == b"edited"


def test_front_matter_is_put_in_front_once(run, adapter):
    manifest = Store().manifest(Store().resolve("french:v1"))
    once = with_front_matter(README, manifest)
    assert with_front_matter(once, manifest) == once


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"r": 24}, "--max-lora-rank 32"),
        ({"init_lora_weights": "olora"}, "will not serve this adapter: init_lora_weights 'olora'"),
    ],
)
def test_what_vllm_refuses_is_said(changes, said, hub, run, tmp_path):
    rank = int(str(changes.get("r", 2)))
    weights = {n: row for t in ("model.layers.0.q", "model.layers.0.v") for n, row in pair(t, rank=rank).items()}
    ran = run("push", write_adapter(tmp_path / "a", weights=weights, settings=config(**changes)), "a:v1", "--to", REPO)
    assert ran.code == 0
    assert (said or "vLLM") in ran.err if said else "vLLM" not in ran.err


def test_search(hub, adapter, run):
    run("push", "french:v1", "--to", REPO)
    assert run("--json", "search", "fren", "--on", "hf://").json == [
        {"name": REPO, "base": "acme/base", "downloads": 7}
    ]
    assert run("search", "nothing", "--on", "hf://").code == 0
    assert run("--json", "search", "FREN").json == [{"name": "french:v1", "base": "acme/base"}]
    assert run("search", "x", "--on", "s3://").code == 2


def test_from_python(hub, adapter, tmp_path):
    import loraforge as lf

    registry = lf.Registry()
    digest = registry.push(str(adapter), "python:v1", to=REPO)
    other = lf.Registry(tmp_path / "other")
    assert other.pull(f"{REPO}@v1") == digest
    assert other.pull(f"{REPO}@v1", name="mine:v1") == digest
    assert [str(line.ref) for line in other.ls()] == ["french:v1", "mine:v1"]
    assert other.pull("mine:v1", tmp_path / "out") == digest
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["r"] == 2
