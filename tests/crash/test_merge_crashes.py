"""Kill before every call that changes the file system; then what is there must be honest, and the next run must end."""

import os
import shutil

import pytest
import torch
from safetensors.torch import save_file

import loraforge as lf
from loraforge.adapter import LowRank
from loraforge.checkpoint import engine, output
from loraforge.checkpoint.reader import open_checkpoint
from loraforge.errors import LoraforgeError

MUTATING = {
    "mkdir", "posix_fallocate", "ftruncate", "pwrite", "copy_file_range", "fsync", "rename", "unlink", "rmdir", "open",
}  # fmt: skip
KILLED = 77


class Dying:
    """``os``, whose process dies before the call number ``at`` that would change the file system."""

    def __init__(self, at, count=None):
        self.at, self.count, self.seen = at, count, 0

    def __getattr__(self, name):
        found = getattr(os, name)
        if name not in MUTATING:
            return found

        def call(*arguments, **named):
            if name == "open" and not arguments[1] & os.O_CREAT:
                return found(*arguments, **named)
            if self.seen == self.at:
                os._exit(KILLED)
            self.seen += 1
            return found(*arguments, **named)

        return call


def in_child(action, at):
    """Run in a fork that dies at a call; return whether it got that far, and how many calls were made."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            engine.in_threads = lambda run, jobs: (run(job) for job in jobs)
            output.os = shim = Dying(at)
            action()
            os.write(write, shim.seen.to_bytes(4, "little"))
            code = 0
        except LoraforgeError as error:
            os.write(2, f"{error}\n".encode())
        finally:
            os._exit(code)
    os.close(write)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    count = int.from_bytes(os.read(read, 4), "little")
    os.close(read)
    assert status in (0, KILLED)
    return status == KILLED, count


@pytest.fixture
def world(tmp_path):
    torch.set_num_threads(1)
    g = torch.Generator().manual_seed(0)
    base = tmp_path / "base"
    base.mkdir()
    tensors = {
        name: (torch.randn(60, 90, generator=g) * 0.02).bfloat16() for name in ("q.weight", "k.weight", "o.weight")
    }
    save_file(tensors | {"norm.weight": torch.ones(3).bfloat16()}, base / "model.safetensors")
    (base / "config.json").write_text("{}")
    pairs = {
        name: LowRank("linear", torch.randn(2, 90, generator=g), torch.randn(60, 2, generator=g) * 1e-3, 2.0)
        for name in ("q", "k")
    }
    adapter = lf.Adapter(pairs)
    lf.merge(base, adapter, tmp_path / "merged")
    return tmp_path, base, adapter


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def is_model(folder):
    try:
        with open_checkpoint(folder):
            return True
    except LoraforgeError:
        return False


def enumerate_kills(action, check, reset):
    """Kill ``action`` before each of its calls; ``check`` what is left, and run it again."""
    at = 0
    while True:
        reset()
        killed, count = in_child(action, at)
        check(killed)
        if not killed:
            assert count == at
            return count
        at += 1


def test_merge_and_its_resume(world):
    folder, base, adapter = world
    before, expected, out = files(base), files(folder / "merged"), folder / "out"

    def reset():
        shutil.rmtree(out, ignore_errors=True)

    def check(killed):
        assert files(base) == before
        assert not out.exists() or files(out) == expected
        for at in (0, 3, 9, 15, 22):  # the resume is killed as well
            in_child(lambda: lf.merge(base, adapter, out) if not out.exists() else None, at)
            assert not out.exists() or files(out) == expected
        if not out.exists():
            lf.merge(base, adapter, out)
        assert files(out) == expected
        assert not [p for p in folder.iterdir() if p.name.startswith(".")]

    assert enumerate_kills(lambda: lf.merge(base, adapter, out), check, reset) > 15


def test_unmerge(world):
    folder, base, adapter = world
    merged, expected, out = folder / "merged", files(base), folder / "out"
    before = files(merged)

    def check(killed):
        assert files(merged) == before
        assert not out.exists() or files(out) == expected
        if not out.exists():
            lf.unmerge(merged, out, adapters=[adapter])
        assert files(out) == expected

    action = lambda: lf.unmerge(merged, out, adapters=[adapter])  # noqa: E731 - one of several actions
    assert enumerate_kills(action, check, lambda: shutil.rmtree(out, ignore_errors=True)) > 15


@pytest.mark.parametrize("then", ["again", "back"])
@pytest.mark.parametrize("operation", ["merge", "unmerge"])
def test_in_place(world, operation, then):
    folder, base, adapter = world
    plain, merged, work = files(base), files(folder / "merged"), folder / "work"
    source = base if operation == "merge" else folder / "merged"
    actions = {
        "merge": lambda: lf.merge_in_place(work, adapter),
        "unmerge": lambda: lf.unmerge_in_place(work, adapters=[adapter]),
    }

    def reset():
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(source, work)

    def honest():
        model = files(work).get("model.safetensors")
        assert model in (None, plain["model.safetensors"], merged["model.safetensors"])
        assert is_model(work) == (model is not None)

    def check(killed):
        honest()
        for at in (0, 2, 5, 8):
            in_child(lambda: actions[operation]() if list(work.glob("*.journal")) else None, at)
            honest()
        if then == "again":
            try:
                actions[operation]()
            except LoraforgeError:  # it was done already
                assert not list(work.glob("*.journal"))
            assert files(work) == (merged if operation == "merge" else plain)
        elif operation == "merge":
            try:
                lf.unmerge_in_place(work, adapters=[adapter])
            except LoraforgeError:  # nothing was merged yet
                assert files(work)["model.safetensors"] == plain["model.safetensors"]
            assert files(work)["model.safetensors"] == plain["model.safetensors"]

    assert enumerate_kills(actions[operation], check, reset) > 8
