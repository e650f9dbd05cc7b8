"""``index.sqlite`` deleted or spoiled before every command: each says and does exactly the same."""

import os
import re
import sqlite3

import pytest

from loraforge_registry.store import Store
from tests.bad_files import config, tensors, write_adapter


def garbage(path):
    path.write_bytes(b"no database at all" * 100)


def half(path):
    os.truncate(path, path.stat().st_size // 2)


def other_rows(path):
    with sqlite3.connect(path) as database:
        database.execute("UPDATE summary SET row = x'980100'")
    database.close()


def directory(path):
    path.unlink()
    path.mkdir()


SPOIL = {
    "kept": lambda _path: None,
    "gone": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "garbage": garbage,
    "half": half,
    "other rows": other_rows,
    "a directory": directory,
}
COMMANDS = (
    "ls --json", "ls", "ls a --json", "show a:v1 --json", "show b --json", "log a:v1 --json", "log b --reflog",
    "diff a:v1 b --json", "du --json", "push {home}/c c:v1 --json", "push {home}/a a:v1 --json", "tag a:v1 d:v1 --json",
    "ls --json", "rm d:v1 --json", "compose a:v1=0.5 b=0.5 --as e:v1 --json", "rerank a:v1 --rank 1 --as f:v1 --json",
    "log e:v1 --json", "gc --dry-run --json", "rm f:v1 --json", "gc --yes --json", "fsck --deep --json", "du --json",
    "pull e:v1 --to {home}/out --json", "ls --json", "show missing:v1", "tag a:v1 b:latest --json",
)  # fmt: skip


def story(home, run, spoil):
    """Run every command on a new store, with the cache spoiled before each; return what they said."""
    home.mkdir()
    for name, value in (("a", 0.5), ("b", 0.25), ("c", 2.0)):
        write_adapter(home / name, weights=tensors(value), settings=config(base_model_name_or_path="some/base"))
    store = home / "store"
    run("--store", store, "push", home / "a", "a:v1")
    run("--store", store, "push", home / "b", "b")
    said = []
    for command in COMMANDS:
        index = store / "index.sqlite"
        if index.is_dir():
            index.rmdir()
        if index.exists():
            spoil(index)
        ran = run("--store", store, *command.format(home=home).split())
        out, err = (re.sub(r"trash/[0-9a-f]{24}", "trash/", text.replace(str(home), "")) for text in (ran.out, ran.err))
        said.append((command, ran.code, out, err))
    refs = {path.name: path.read_text() for path in (store / "refs").iterdir()}
    assert Store(store).fsck(deep=True).holds
    return [row for row in said if "--reflog" not in row[0]], refs


@pytest.mark.parametrize("what", [name for name in SPOIL if name != "kept"])
def test_every_command_says_the_same(tmp_path, run, what):
    expected = story(tmp_path / "kept", run, SPOIL["kept"])
    assert [row[1] for row in expected[0] if row[0] != "show missing:v1"] == [0] * (len(COMMANDS) - 2)
    assert story(tmp_path / "spoiled", run, SPOIL[what]) == expected
