"""Bases on disk: one file or shards, and everything that an index may get wrong."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import save_file

from loraforge.checkpoint.reader import open_checkpoint, read_index
from loraforge.errors import ConflictError, FormatError, InputOutputError, NotFoundError
from tests.checkpoints import a_base, raw, write_base, write_index, write_shards

TENSORS = a_base()
NAMES = list(TENSORS)
INDEX = "model.safetensors.index.json"
FIRST, SECOND = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
MAP = {name: FIRST if number < 2 else SECOND for number, name in enumerate(NAMES)}


def shards(folder):
    return write_shards(folder, [{n: TENSORS[n] for n in NAMES[:2]}, {n: TENSORS[n] for n in NAMES[2:]}])


def read_all(source, **options):
    """The bytes of every tensor, read in two uneven pieces."""
    found = {}
    with open_checkpoint(source, **options) as checkpoint:
        for name, tensor in checkpoint.tensors.items():
            buffer = bytearray(tensor.nbytes)
            cut = tensor.nbytes // 3
            checkpoint.read_into(tensor, 0, memoryview(buffer)[:cut])
            checkpoint.read_into(tensor, cut, memoryview(buffer)[cut:])
            found[name] = bytes(buffer)
        checkpoint.check_unchanged()
        assert checkpoint.nbytes == sum(map(len, found.values()))
    return found


EXPECTED = {name: raw(tensor) for name, tensor in TENSORS.items()}


def test_one_file(tmp_path):
    base = write_base(tmp_path, TENSORS)
    assert read_all(base) == read_all(str(base)) == read_all(base / "model.safetensors") == EXPECTED
    with open_checkpoint(base) as checkpoint:
        assert (checkpoint.path, checkpoint.others) == (base, ("config.json",))
    with open_checkpoint(base / "model.safetensors") as checkpoint:
        assert checkpoint.others == ()


def test_one_file_of_any_name(tmp_path):
    base = write_base(tmp_path, TENSORS)
    (base / "model.safetensors").rename(base / "weights-v2.safetensors")
    assert read_all(base) == EXPECTED
    # an adapter beside it is no part of it
    save_file({"x": torch.ones(1)}, base / "adapter_model.safetensors")
    assert read_all(base) == EXPECTED


def test_shards(tmp_path):
    base = shards(tmp_path)
    assert read_all(base) == EXPECTED
    with open_checkpoint(base) as checkpoint:
        assert list(checkpoint.shards) == [FIRST, SECOND]
        assert {name: tensor.shard for name, tensor in checkpoint.tensors.items()} == MAP
        assert checkpoint.others == (INDEX,)


def test_one_file_comes_before_an_index(tmp_path):
    """As transformers reads it."""
    base = shards(tmp_path)
    save_file({"x": torch.ones(2)}, base / "model.safetensors")
    assert list(read_all(base)) == ["x"]
    with open_checkpoint(base) as checkpoint:
        assert checkpoint.others == (FIRST, SECOND, INDEX)


def test_scalars_empty_tensors_and_small_types(tmp_path):
    tensors = {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 5), "bool": torch.tensor([True, False])}
    base = write_base(tmp_path, tensors)
    assert read_all(base) == {name: raw(tensor) for name, tensor in tensors.items()}
    with open_checkpoint(base) as checkpoint:
        sizes = {name: (tensor.nbytes, tensor.itemsize) for name, tensor in checkpoint.tensors.items()}
    assert sizes == {"scalar": (4, 4), "empty": (0, 0), "bool": (2, 1)}


# --- what is not there, or not a checkpoint ---------------------------------------------------------------------------


def empty(folder):
    folder.mkdir()


def adapter(folder):
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    save_file({"x": torch.ones(1)}, folder / "adapter_model.safetensors")


def pickles(folder):
    folder.mkdir()
    (folder / "pytorch_model-00001-of-00002.bin").write_bytes(b"PK\3\4")


def two_files(folder):
    folder.mkdir()
    for name in "ab":
        save_file({name: torch.ones(1)}, folder / f"{name}.safetensors")


def cut_off(folder):
    write_base(folder, TENSORS)
    (folder / "model.safetensors").rename(folder / "model.safetensors.merging")


NOT_FOUND = [
    (lambda _: None, "no such file or directory"),
    (empty, r"no model.safetensors and no model.safetensors.index.json there"),
    (adapter, "this is an adapter, expected the checkpoint of a base model"),
    (pickles, "its weights are pickles, which are never opened here"),
    (two_files, r"2 safetensors files but no model.safetensors.index.json"),
    (cut_off, "an in-place merge was cut off here"),
]


@pytest.mark.parametrize(("build", "says"), NOT_FOUND, ids=[says[:20] for _, says in NOT_FOUND])
def test_no_checkpoint(build, says, tmp_path):
    build(tmp_path / "base")
    with pytest.raises(NotFoundError, match=rf"base: {says}"), open_checkpoint(tmp_path / "base"):
        pass


def test_files_that_were_put_aside_count_where_they_are_asked_for(tmp_path):
    base = shards(tmp_path)
    (base / SECOND).rename(base / f"{SECOND}.merging")
    assert read_all(base, aside=True) == EXPECTED
    with pytest.raises(NotFoundError, match="an in-place merge was cut off here"), open_checkpoint(base):
        pass


@pytest.mark.parametrize("data", [b"", b"PK\3\4" + bytes(50), b"version https://git-lfs.github.com/spec/v1\noid x\n"])
def test_a_file_that_is_no_safetensors_file(data, tmp_path):
    base = write_base(tmp_path, TENSORS)
    (base / "model.safetensors").write_bytes(data)
    with pytest.raises(FormatError, match=r"model\.safetensors: not a safetensors file"), open_checkpoint(base):
        pass


def test_a_file_that_is_cut_short(tmp_path):
    base = shards(tmp_path)
    os.truncate(base / SECOND, (base / SECOND).stat().st_size - 1)
    with pytest.raises(FormatError, match=rf"{SECOND}: .*cut short"), open_checkpoint(base):
        pass


@pytest.mark.parametrize("name", ["model.safetensors", SECOND])
def test_a_directory_or_a_fifo_where_a_file_should_be(name, tmp_path):
    for number, make in enumerate((os.mkdir, os.mkfifo)):
        base = shards(tmp_path / str(number))
        (base / name).unlink(missing_ok=True)
        make(base / name)
        with pytest.raises((FormatError, InputOutputError, NotFoundError, ConflictError)), open_checkpoint(base):
            pass


# --- indexes ----------------------------------------------------------------------------------------------------------


def indexed(tmp_path, change):
    """A base of two shards whose weight map was changed."""
    base = shards(tmp_path / "base")
    weight_map = dict(MAP)
    change(weight_map)
    write_index(base, weight_map)
    return base


def refuses(base, kind, says):
    with pytest.raises(kind, match=says), open_checkpoint(base):
        pass


ELSEWHERE = ["../x.safetensors", "sub/x.safetensors", "/etc/x.safetensors", "..", ".", "", ".hidden.safetensors"]


@pytest.mark.parametrize(
    "shard",
    [*ELSEWHERE, "x.bin", "./x.safetensors", "x.safetensors/", "a\\..\\x.bin", 5, None, ["x"], "x\0.safetensors/"],
)
def test_a_shard_is_a_file_beside_the_index(shard, tmp_path):
    save_file({NAMES[0]: TENSORS[NAMES[0]]}, tmp_path / "x.safetensors")
    base = indexed(tmp_path, lambda weight_map: weight_map.update({NAMES[0]: shard}))
    (base / "sub").mkdir()
    shutil.copy(tmp_path / "x.safetensors", base / "sub")
    refuses(base, FormatError, rf"{INDEX}: tensor {NAMES[0]!r} is said to be in .*, expected a file beside it")


def test_a_shard_with_a_nul_in_its_name(tmp_path):
    base = indexed(tmp_path, lambda weight_map: weight_map.update({NAMES[0]: "x\0.safetensors"}))
    refuses(base, (FormatError, NotFoundError, InputOutputError), "x")


def test_a_shard_that_is_missing(tmp_path):
    base = shards(tmp_path)
    (base / SECOND).unlink()
    refuses(base, NotFoundError, SECOND)


def test_a_tensor_that_is_in_another_shard(tmp_path):
    base = indexed(tmp_path, lambda weight_map: weight_map.update({NAMES[0]: SECOND}))
    refuses(base, FormatError, rf"the index puts tensor {NAMES[0]!r} in {SECOND}, it is in {FIRST}")


def test_a_tensor_that_is_in_no_shard(tmp_path):
    base = indexed(tmp_path, lambda weight_map: weight_map.update({"ghost": FIRST}))
    refuses(base, FormatError, rf"the index puts tensor 'ghost' in {FIRST}, it is in None")


def test_a_tensor_that_is_not_in_the_index(tmp_path):
    base = indexed(tmp_path, lambda weight_map: weight_map.pop(NAMES[0]))
    refuses(base, FormatError, rf"the index puts tensor {NAMES[0]!r} in None, it is in {FIRST}")


def test_a_tensor_in_two_shards(tmp_path):
    base = write_shards(tmp_path, [TENSORS, {NAMES[0]: TENSORS[NAMES[0]]}])
    refuses(base, FormatError, rf"tensor {NAMES[0]!r} is in {FIRST} and in {SECOND}, expected once")


def test_a_file_that_the_index_does_not_name_is_none_of_it(tmp_path):
    base = shards(tmp_path)
    save_file({NAMES[0]: TENSORS[NAMES[0]]}, base / "old.safetensors")
    assert read_all(base) == EXPECTED
    with open_checkpoint(base) as checkpoint:
        assert checkpoint.others == (INDEX, "old.safetensors")


TEXTS = [
    "", "[]", "3", "{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": null}', '{"weight_map": {"a": 1}',
    '{"weight_map": {"a": "a.safetensors", "a": "b.safetensors"}}', '{"weight_map": {"a": NaN}}', "\ufeff{}",
    '{"weight_map":' + "[" * 100 + "]" * 100 + "}",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_an_index_that_is_none(text, tmp_path):
    base = shards(tmp_path)
    (base / INDEX).write_text(text)
    refuses(base, FormatError, rf"{INDEX}: ")


def test_an_index_that_is_too_large(tmp_path, monkeypatch):
    base = shards(tmp_path)
    monkeypatch.setattr("loraforge.checkpoint.reader.MAX_INDEX", 100)
    refuses(base, FormatError, "the limit is 100")
    monkeypatch.undo()
    monkeypatch.setattr("loraforge.checkpoint.reader.MAX_SHARDS", 1)
    refuses(base, FormatError, "2 shards; the limit is 1")


def test_read_index_returns_the_map(tmp_path):
    assert read_index(shards(tmp_path) / INDEX) == MAP


def test_metadata_of_an_index_may_be_anything(tmp_path):
    base = shards(tmp_path)
    (base / INDEX).write_text(json.dumps({"metadata": {"total_size": -1.5, "x": [1]}, "weight_map": MAP, "y": 1}))
    assert read_all(base) == EXPECTED


# --- files that change while they are read ----------------------------------------------------------------------------


def overwrite(path):
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")


def grow(path):
    with path.open("ab") as file:
        file.write(b"x")


CHANGES = {"overwritten": overwrite, "longer": grow, "dated": os.utime, "shorter": lambda path: os.truncate(path, 600)}


@pytest.mark.parametrize("how", CHANGES)
def test_a_file_that_changes_is_noticed(how, tmp_path):
    base = shards(tmp_path)
    with open_checkpoint(base) as checkpoint:
        checkpoint.check_unchanged()
        CHANGES[how](base / SECOND)
        with pytest.raises(ConflictError, match=rf"{SECOND} changed while it was read"):
            checkpoint.check_unchanged()


def test_a_file_that_gets_shorter_while_it_is_read_ends_in_an_error(tmp_path):
    base = shards(tmp_path)
    with open_checkpoint(base) as checkpoint:
        os.truncate(base / FIRST, 300)
        buffer = bytearray(checkpoint.tensors[NAMES[1]].nbytes)
        with pytest.raises(InputOutputError, match=rf"{FIRST} was cut short while it was read: tensor {NAMES[1]!r}"):
            checkpoint.read_into(checkpoint.tensors[NAMES[1]], 0, memoryview(buffer))


def test_a_file_that_another_takes_the_place_of_is_read_to_its_end(tmp_path):
    """Its descriptor is open: what is read is one version, the old one."""
    base = shards(tmp_path)
    with open_checkpoint(base) as checkpoint:
        shutil.copy(base / FIRST, base / "new")
        overwrite(base / "new")
        (base / "new").replace(base / FIRST)
        tensor = checkpoint.tensors[NAMES[1]]
        buffer = bytearray(tensor.nbytes)
        checkpoint.read_into(tensor, 0, memoryview(buffer))
        assert bytes(buffer) == EXPECTED[NAMES[1]]


def test_every_file_is_closed_again(tmp_path):
    base = shards(tmp_path)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None  # noqa: PTH112 - no path of ours
    with open_checkpoint(base):
        pass
    for change in (lambda m: m.update({NAMES[0]: SECOND}), lambda m: m.update({NAMES[0]: "no.safetensors"})):
        with pytest.raises((FormatError, NotFoundError)), open_checkpoint(indexed(tmp_path / str(id(change)), change)):
            pass
    assert before is None or len(os.listdir("/proc/self/fd")) == before
