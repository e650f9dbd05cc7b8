"""What people do with huggingface_hub, with nothing set but HF_ENDPOINT and HF_TOKEN; any version from 0.36 on.

    HF_ENDPOINT=http://127.0.0.1:7860 HF_TOKEN=lf_... python hub_client.py NAMESPACE DIRECTORY [HF_COMMAND]

DIRECTORY holds an adapter. Each step asserts; the number of steps is printed at the end.
"""

import hashlib
import os
import re
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path

import huggingface_hub
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.utils import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

STEPS = []
BROKEN_OFF = 23_000_000
ODD = ("sub/dir/a file with spaces.txt", "sub/größe.txt", "empty.txt", "a%2Fb.txt")


def step(function):
    STEPS.append(function)
    return function


class World:
    def __init__(self, namespace, adapter):
        self.api = HfApi()
        self.namespace = namespace
        self.repo = f"{namespace}/conform-{secrets.token_hex(4)}"
        self.adapter = Path(adapter)
        self._folder = tempfile.TemporaryDirectory()  # gone with this
        self.folder = Path(self._folder.name)
        for path in self.adapter.iterdir():
            if path.is_file():
                (self.folder / path.name).write_bytes(path.read_bytes())
        (self.folder / "README.md").write_text("---\nlibrary_name: peft\n---\n# Card\n")
        for name in ODD:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).write_text("" if name == "empty.txt" else f"{name}\n")
        (self.folder / "large.dat").write_bytes(secrets.token_bytes(3_000_000) + bytes(500_000))

    def files(self):
        return {str(p.relative_to(self.folder)): p.read_bytes() for p in self.folder.rglob("*") if p.is_file()}


def refused(kind, function, *arguments, status=None, **named):
    try:
        function(*arguments, **named)
    except kind as found:
        error = found
    else:
        raise AssertionError(f"{function} was not refused with {kind}")
    assert status in (None, getattr(getattr(error, "response", None), "status_code", None)), error


def git_sha1(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()  # noqa: S324 - git's


@step
def who_am_i(w):
    assert w.api.whoami()["name"] == w.namespace


@step
def make_a_repository(w):
    url = w.api.create_repo(w.repo)
    assert url.repo_id == w.repo
    assert w.api.create_repo(w.repo, exist_ok=True).repo_id == w.repo
    refused(HfHubHTTPError, w.api.create_repo, w.repo, status=409)
    assert [b.name for b in w.api.list_repo_refs(w.repo).branches] == ["main"]


@step
def push_a_folder_as_one_commit(w):
    before = w.api.model_info(w.repo).sha
    w.first = w.api.upload_folder(repo_id=w.repo, folder_path=w.folder, commit_message="push", commit_description="all")
    after = w.api.list_repo_commits(w.repo)
    assert [c.title for c in after] == ["push", "initial commit"]
    assert after[0].message == "all"
    assert after[1].commit_id == before
    assert w.first.oid == after[0].commit_id == w.api.model_info(w.repo).sha


@step
def push_it_again_and_nothing_happens(w):
    again = w.api.upload_folder(repo_id=w.repo, folder_path=w.folder, commit_message="push")
    assert len(w.api.list_repo_commits(w.repo)) == 2
    assert again.oid == w.first.oid


@step
def look_at_it(w):
    info = w.api.model_info(w.repo, files_metadata=True)
    held = w.files()
    by_name = {s.rfilename: s for s in info.siblings}
    assert set(by_name) == {*held, ".gitattributes"}
    for name, data in held.items():
        assert by_name[name].size == len(data)
        if by_name[name].lfs is not None:
            assert by_name[name].lfs["sha256"] == hashlib.sha256(data).hexdigest()
        else:
            assert by_name[name].blob_id == git_sha1(data)
    assert by_name["adapter_model.safetensors"].lfs is not None
    assert by_name["README.md"].lfs is None
    assert set(w.api.list_repo_files(w.repo)) == set(by_name)
    listed = list(w.api.list_repo_tree(w.repo, recursive=True))
    assert {"sub", "sub/dir"} <= {e.path for e in listed}
    assert [e.path for e in w.api.list_repo_tree(w.repo, "sub/dir")] == ["sub/dir/a file with spaces.txt"]
    found = w.api.get_paths_info(w.repo, ["README.md", "sub", "none"])
    assert sorted(e.path for e in found) == ["README.md", "sub"]
    assert w.api.file_exists(w.repo, "README.md")
    assert not w.api.file_exists(w.repo, "none")


@step
def get_every_byte_back(w):
    with tempfile.TemporaryDirectory() as cache:
        got = Path(snapshot_download(w.repo, cache_dir=cache))
        for name, data in w.files().items():
            assert (got / name).read_bytes() == data, name
        assert got.name == w.first.oid
        if hasattr(w.api, "verify_repo_checksums"):
            checked = w.api.verify_repo_checksums(w.repo, cache_dir=cache)
            assert not checked.mismatches
            assert checked.checked_count == len(w.files()) + 1
        refused(EntryNotFoundError, hf_hub_download, w.repo, "none.txt", cache_dir=cache)
        assert list(Path(cache).rglob(".no_exist/*/none.txt"))


@step
def be_told_what_is_not_there(w):
    with tempfile.TemporaryDirectory() as cache:
        refused(RevisionNotFoundError, hf_hub_download, w.repo, "README.md", revision="none", cache_dir=cache)
        refused(RepositoryNotFoundError, hf_hub_download, w.namespace + "/none", "README.md", cache_dir=cache)
        refused(RepositoryNotFoundError, w.api.model_info, w.namespace + "/none")
        refused((HfHubHTTPError, OSError), HfApi(token="lf_wrong").whoami)  # noqa: S106 - it is no token


@step
def branch_and_tag(w):
    w.api.create_tag(w.repo, tag="v1", tag_message="one")
    refused(HfHubHTTPError, w.api.create_tag, w.repo, tag="v1", status=409)
    w.api.create_tag(w.repo, tag="v1", exist_ok=True)
    w.api.create_branch(w.repo, branch="feat/a", revision="v1")
    refused(HfHubHTTPError, w.api.create_branch, w.repo, branch="feat/a", status=409)
    w.api.upload_file(path_or_fileobj=b"there", path_in_repo="b c.txt", repo_id=w.repo, revision="feat/a")
    refs = w.api.list_repo_refs(w.repo)
    assert {b.name for b in refs.branches} == {"main", "feat/a"}
    assert {t.name: t.target_commit for t in refs.tags} == {"v1": w.first.oid}
    with tempfile.TemporaryDirectory() as cache:
        path = hf_hub_download(w.repo, "b c.txt", revision="feat/a", cache_dir=cache)
        assert Path(path).read_bytes() == b"there"
        path = hf_hub_download(w.repo, "README.md", revision="v1", cache_dir=cache)
        assert w.first.oid in path
    assert not w.api.file_exists(w.repo, "b c.txt")
    w.api.delete_tag(w.repo, tag="v1")
    w.api.delete_branch(w.repo, branch="feat/a")
    refused(RevisionNotFoundError, w.api.model_info, w.repo, revision="v1")


@step
def commit_on_what_was_seen(w):
    head = w.api.model_info(w.repo).sha
    add = [CommitOperationAdd("x.txt", b"x")]
    w.api.create_commit(w.repo, add, commit_message="x", parent_commit=head)
    add = [CommitOperationAdd("y.txt", b"y")]
    refused(HfHubHTTPError, w.api.create_commit, w.repo, add, commit_message="y", parent_commit=head, status=412)
    assert not w.api.file_exists(w.repo, "y.txt")


@step
def copy_and_delete(w):
    copy = [CommitOperationCopy("large.dat", "copy.dat")]
    w.api.create_commit(w.repo, copy, commit_message="copy")
    with tempfile.TemporaryDirectory() as cache:
        path = hf_hub_download(w.repo, "copy.dat", cache_dir=cache)
        assert Path(path).read_bytes() == w.files()["large.dat"]
    w.api.delete_file("copy.dat", w.repo)
    assert not w.api.file_exists(w.repo, "copy.dat")
    refused(HfHubHTTPError, w.api.delete_file, "copy.dat", w.repo, status=404)
    w.api.create_commit(w.repo, [CommitOperationDelete("sub/", is_folder=True)], commit_message="rm sub")
    assert not any(name.startswith("sub/") for name in w.api.list_repo_files(w.repo))


@step
def find_it(w):
    assert w.repo in [m.id for m in w.api.list_models(search=w.repo.partition("/")[2])]
    assert w.repo in [m.id for m in w.api.list_models(author=w.namespace, limit=1000)]
    assert w.repo in [m.id for m in w.api.list_models(filter="peft", limit=1000)]


@step
def keep_it_private(w):
    name = w.repo + "-private"
    w.api.create_repo(name, private=True)
    w.api.upload_file(path_or_fileobj=b"secret", path_in_repo="s.txt", repo_id=name)
    assert w.api.model_info(name).private
    refused(RepositoryNotFoundError, HfApi(token=False).model_info, name)
    with tempfile.TemporaryDirectory() as cache:
        refused(RepositoryNotFoundError, hf_hub_download, name, "s.txt", token=False, cache_dir=cache)
        assert Path(hf_hub_download(name, "s.txt", cache_dir=cache)).read_bytes() == b"secret"
    w.api.delete_repo(name)
    refused(RepositoryNotFoundError, w.api.delete_repo, name)
    w.api.delete_repo(name, missing_ok=True)


@step
def be_refused_what_is_unsafe(w):
    refused(
        HfHubHTTPError,
        w.api.upload_file,
        path_or_fileobj=b"\x80\x04N.",
        path_in_repo="adapter_model.bin",
        repo_id=w.repo,
    )
    bad = b"\xff" * 100
    refused(HfHubHTTPError, w.api.upload_file, path_or_fileobj=bad, path_in_repo="bad.safetensors", repo_id=w.repo)
    assert not w.api.file_exists(w.repo, "bad.safetensors")


@step
def several_fill_one_cache_at_once(w):
    code = "import huggingface_hub as h, sys; print(h.snapshot_download(sys.argv[1], cache_dir=sys.argv[2]))"
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-c", code, w.repo, cache]
        clients = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
        said = {client.communicate(timeout=120)[0].strip() for client in clients}
        assert [client.returncode for client in clients] == [0] * 4
        (got,) = said
        assert (Path(got) / "large.dat").read_bytes() == w.files()["large.dat"]


@step
def go_on_where_it_broke_off(w):
    """The matrix's server breaks off the first time that this length is asked for (hub_matrix.SERVE)."""
    data = secrets.token_bytes(BROKEN_OFF)
    w.api.upload_file(path_or_fileobj=data, path_in_repo="long.dat", repo_id=w.repo)
    with tempfile.TemporaryDirectory() as cache:
        try:
            path = hf_hub_download(w.repo, "long.dat", cache_dir=cache)
        except Exception:  # noqa: BLE001 - each client has its own
            assert huggingface_hub.__version__.startswith(("0.", "1.0.")), "newer ones go on by themselves"
            path = hf_hub_download(w.repo, "long.dat", cache_dir=cache)
        assert Path(path).read_bytes() == data


@step
def by_the_command_line(w):
    if w.hf is None:
        return

    def hf(*arguments):
        done = subprocess.run([w.hf, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, f"{arguments}: {done.stderr}{done.stdout}"
        return done.stdout

    def knows(group, word):
        return re.search(rf"^[ |│]*{word}\b", hf(*group, "--help"), re.MULTILINE)

    name = w.repo + "-cli"
    repos = "repos" if knows([], "repos") else "repo"
    assert w.namespace in hf("auth", "whoami")
    hf(repos, "create", name)
    hf("upload", name, w.adapter)
    hf(repos, "tag", "create", name, "v1")
    assert "v1" in hf(repos, "tag", "list", name)
    with tempfile.TemporaryDirectory() as folder:
        hf("download", name, "--revision", "v1", "--local-dir", folder)
        for path in w.adapter.iterdir():
            assert (Path(folder) / path.name).read_bytes() == path.read_bytes()
    files = ("repos", "delete-files") if repos == "repos" else ("repo-files", "delete")
    hf(*files, name, "README.md" if (w.adapter / "README.md").exists() else "adapter_config.json")
    hf(repos, "tag", "delete", name, "v1", "-y")
    if knows([repos], "branch"):
        hf(repos, "branch", "create", name, "dev")
        hf(repos, "branch", "delete", name, "dev")
    if knows([], "models"):
        assert name in hf("models", "info", name)
        assert name in hf("models", "list", "--format", "json", "--search", name.partition("/")[2])
    if knows(["cache"], "verify"):
        hf("download", w.repo)
        hf("cache", "verify", w.repo)
        assert w.repo in hf("cache", "list")
    if knows([repos], "delete"):
        hf(repos, "delete", name, *(["--yes"] if "--yes" in hf(repos, "delete", "--help") else []))
        refused(RepositoryNotFoundError, w.api.model_info, name)


@step
def delete_it(w):
    w.api.delete_repo(w.repo)
    refused(RepositoryNotFoundError, w.api.model_info, w.repo)


def main():
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    w = World(sys.argv[1], sys.argv[2])
    w.hf = sys.argv[3] if len(sys.argv) > 3 else None
    for number, function in enumerate(STEPS):
        try:
            function(w)
        except BaseException:
            print(f"FAILED at {function.__name__}, step {number}, huggingface_hub {huggingface_hub.__version__}")
            raise
    print(f"{len(STEPS)} steps, huggingface_hub {huggingface_hub.__version__}")


if __name__ == "__main__":
    main()
