"""Files: PEFT's are read, ours are loaded by PEFT, bit for bit."""

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import loraforge as lf
from loraforge.formats import peft as peft_format
from loraforge_registry.errors import ConfigError, KeyMismatchError
from tests.conformance.peft_cases import CASES, UNSUPPORTED, VECTORS, deltas, load, lora_layers, make, state, write

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own remarks about its layers

VERSIONS = sorted(path.name for path in VECTORS.iterdir() if path.is_dir())
GOLDENS = sorted(path for path in VECTORS.glob("*/*") if path.name not in UNSUPPORTED)
# What old and new PEFT write differently, so that the adapters really are not the same.
DIFFER = {"bias_lora_only", "conv2d_grouped"}


def equal_bits(first, second):
    assert first.keys() == second.keys()
    for key in first:
        assert first[key].dtype == second[key].dtype, key
        assert torch.equal(first[key], second[key]), key


@pytest.mark.parametrize("name", CASES)
def test_round_trip_through_loraforge_keeps_every_bit_in_peft(name, tmp_path):
    written = write(CASES[name], tmp_path / "theirs")
    lf.save(lf.load(written.folder), tmp_path / "ours")
    again = load(written, tmp_path / "ours")
    equal_bits(deltas(load(written, written.folder)), deltas(again))
    equal_bits(state(written.model), state(again))


@pytest.mark.parametrize("name", CASES)
def test_peft_misses_no_key_of_ours(name, tmp_path, recwarn):
    written = write(CASES[name], tmp_path / "theirs")
    lf.save(lf.load(written.folder), tmp_path / "ours")
    recwarn.clear()
    load(written, tmp_path / "ours")
    assert not [w for w in recwarn if "missing" in str(w.message).lower()]


@pytest.mark.parametrize("name", CASES)
def test_what_peft_saves_of_ours_is_ours(name, tmp_path):
    written = write(CASES[name], tmp_path / "theirs")
    first = lf.load(written.folder)
    lf.save(first, tmp_path / "ours")
    load(written, tmp_path / "ours").save_pretrained(str(tmp_path / "again"))
    assert lf.content_id(lf.load(tmp_path / "again")) == lf.content_id(first)


@pytest.mark.parametrize("name", [name for name in CASES if name != "conv2d_grouped"])
def test_delta_is_pefts(name, tmp_path):
    written = write(CASES[name], tmp_path / "theirs")
    ours = lf.load(written.folder)
    for target, theirs in deltas(written.model.float()).items():
        delta = ours.targets[target].delta()
        delta = delta.T if ours.settings.fan_in_fan_out else delta
        assert torch.allclose(delta.to(theirs.dtype), theirs, rtol=1e-5, atol=1e-6), target


@pytest.mark.parametrize("golden", GOLDENS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_reads_what_every_peft_version_wrote(golden):
    adapter = lf.load(golden)
    expected = golden / "expected.safetensors"
    if not expected.exists():
        expected = VECTORS / VERSIONS[-1] / golden.name / "expected.safetensors"
    for target, theirs in (load_file(expected) if expected.exists() else {}).items():
        delta = adapter.targets[target].delta()
        delta = delta.T if adapter.settings.fan_in_fan_out else delta
        # the values are multiples of 1/32, so plain deltas are exact up to PEFT's float32 scale
        assert torch.allclose(delta.float(), theirs, rtol=2e-7, atol=0), target


@pytest.mark.parametrize("name", sorted({path.name for path in GOLDENS} - DIFFER))
def test_content_id_does_not_depend_on_the_version(name):
    found = {str(lf.content_id(lf.load(path))) for path in GOLDENS if path.name == name}
    assert len(found) == 1


def test_content_id_does_not_depend_on_the_hash_seed(tmp_path):
    """PEFT writes target_modules in the order of a set."""
    script = (
        "import sys, torch, warnings; warnings.simplefilter('ignore')\n"
        "from peft import LoraConfig, get_peft_model\n"
        "model = torch.nn.ModuleDict({n: torch.nn.Linear(4, 4) for n in 'abcdefgh'})\n"
        "model = get_peft_model(model, LoraConfig(target_modules=list('abcdefgh')))\n"
        "[p.data.fill_(0.5) for n, p in model.named_parameters() if p.requires_grad]\n"
        "model.save_pretrained(sys.argv[1])\n"
    )
    ids, orders = set(), set()
    for seed in ("1", "2", "3"):
        folder = tmp_path / seed
        subprocess.run([sys.executable, "-c", script, folder], check=True, env={**os.environ, "PYTHONHASHSEED": seed})
        ids.add(str(lf.content_id(lf.load(folder))))
        orders.add(tuple(json.loads((folder / "adapter_config.json").read_text())["target_modules"]))
    assert len(orders) > 1, "the seeds gave one order, so this shows nothing"
    assert len(ids) == 1


@pytest.mark.parametrize("name", ["linear", "patterns", "embedding", "everything_along"])
def test_content_id_is_that_of_the_manifest_and_survives_a_save(name, tmp_path):
    written = write(CASES[name], tmp_path / "theirs")
    registry = lf.Registry(tmp_path / "store")
    stored = registry.store.manifest(registry.push(written.folder))
    adapter = lf.load(written.folder)
    lf.save(adapter, tmp_path / "ours")
    again = registry.store.manifest(registry.push(tmp_path / "ours"))
    assert stored.content_id == again.content_id == lf.content_id(adapter)


def test_saving_twice_gives_equal_bytes(tmp_path):
    written = write(CASES["patterns"], tmp_path / "theirs")
    for name in ("one", "two"):
        lf.save(lf.load(written.folder), tmp_path / name)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@pytest.mark.parametrize("name", sorted(UNSUPPORTED))
def test_refuses_by_name_what_it_does_not_model(name):
    with pytest.raises((ConfigError, KeyMismatchError), match=r"target_parameters|out_proj"):
        lf.load(VECTORS / VERSIONS[-1] / name)


def test_opening_reads_no_tensor(tmp_path):
    """A file whose tensors are a hole on disk opens at once, and stays a hole."""
    written = write(CASES["linear"], tmp_path / "theirs")
    weights = written.folder / "adapter_model.safetensors"
    header = weights.read_bytes()[: 8 + int.from_bytes(weights.read_bytes()[:8], "little")]
    fields = json.loads(header[8:])
    width = 2**22
    for entry, shape, start in (("A", [2, width], 0), ("B", [8, 2], 8 * width)):
        key = f"base_model.model.fc.lora_{entry}.weight"
        fields[key] = {"dtype": "F32", "shape": shape, "data_offsets": [start, start + 4 * shape[0] * shape[1]]}
    kept = {key: value for key, value in fields.items() if "head" not in key}
    text = json.dumps(kept).encode()
    text += b" " * (-len(text) % 8)
    weights.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(weights, 8 + len(text) + 8 * width + 64)
    config = json.loads((written.folder / "adapter_config.json").read_text())
    (written.folder / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["fc"]}))
    touched_before = touched()
    adapter = lf.load(written.folder)
    assert touched() - touched_before < width  # an eighth of the file
    assert adapter.targets["fc"].a.shape == (2, width)


def touched():
    """Bytes of memory that this process has touched for the first time."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt * os.sysconf("SC_PAGE_SIZE")


def test_patterns_are_unambiguous_where_one_path_ends_in_another(tmp_path):
    """PEFT's plain key also matches every longer path that ends in it, and PEFT sorts the keys when it saves."""
    written = write(CASES["rslora_patterns"], tmp_path / "theirs")
    adapter = lf.load(written.folder)
    ranks = {"proj": 3, "block.proj": 3, "deep.block.proj": 2, "out": 1}
    assert {name: pair.rank for name, pair in adapter.targets.items()} == ranks
    lf.save(adapter, tmp_path / "ours")
    load(written, tmp_path / "ours").save_pretrained(str(tmp_path / "again"))
    assert {name: pair.rank for name, pair in lf.load(tmp_path / "again").targets.items()} == ranks
    patterns = peft_format.config_of(adapter).scaling.alpha_pattern
    assert r"^block\.proj" in patterns


def test_dots_in_a_key_are_any_character_as_in_peft(tmp_path):
    """The key x.a.b also matches the module x.a_b in PEFT."""
    names = {"a": nn.ModuleDict({"b": nn.Linear(4, 4)}), "a_b": nn.Linear(4, 4)}
    case = make.Case(
        lambda: nn.ModuleDict({"x": nn.ModuleDict(copy.deepcopy(names))}),
        {"r": 2, "lora_alpha": 2, "target_modules": ["b", "a_b"], "alpha_pattern": {"a.b": 20}},
    )
    written = write(case, tmp_path / "theirs")
    adapter = lf.load(written.folder)
    theirs = {path: layer.scaling["default"] for path, layer in lora_layers(written.model)}
    assert {name: pair.scale for name, pair in adapter.targets.items()} == theirs == {"x.a.b": 10, "x.a_b": 10}
    changed = {name: replace(pair, alpha=2.0 if "_" in name else 20.0) for name, pair in adapter.targets.items()}
    lf.save(replace(adapter, targets=changed), tmp_path / "ours")
    again = {path: layer.scaling["default"] for path, layer in lora_layers(load(written, tmp_path / "ours"))}
    assert again == {"x.a.b": 10, "x.a_b": 1}
