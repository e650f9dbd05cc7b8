"""Checkpoints and adapters for merge tests: small ones, of every element type, with every awkward number in them."""

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import loraforge as lf
from loraforge.adapter import Adapter, LowRank

NAMES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
TINY = {torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24, torch.float32: 2.0**-149, torch.float64: 2.0**-1074}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, std=0.02, dtype=torch.float32):
    return (torch.randn(*shape, generator=generator(seed), dtype=torch.float64) * std).to(dtype)


def awkward(dtype, rows=16, columns=24):
    """Zeros of both signs, subnormals, the least normal number, powers of two and their neighbours, of both signs."""
    tiny, least = TINY[dtype], torch.finfo(dtype).smallest_normal
    near_one = [1.0, 1 - torch.finfo(dtype).eps / 2, 1 + torch.finfo(dtype).eps]
    values = [0.0, -0.0, tiny, 3 * tiny, least, least - tiny, *near_one, *(2.0**-k for k in range(1, 12))]
    values += [-value for value in values if value]
    flat = torch.tensor(values, dtype=torch.float64).repeat(rows * columns // len(values) + 1)[: rows * columns]
    return flat.reshape(rows, columns).to(dtype)


def a_base(dtype=torch.bfloat16):
    """A model of five tensors, of which ``adapter_for`` touches two."""
    return {
        "model.layers.0.q.weight": normal(40, 24, seed=1, dtype=dtype),
        "model.layers.0.v.weight": awkward(dtype),
        "model.layers.0.q.bias": normal(40, seed=3, dtype=dtype),
        "model.embed.weight": normal(30, 24, seed=4, dtype=dtype),
        "model.steps": torch.tensor([7], dtype=torch.int64),
    }


TOUCHED = ("model.layers.0.q", "model.layers.0.v")


def adapter_for(base, ratio=0.01, rank=4, seed=0, targets=TOUCHED):
    """An adapter whose updates have ``ratio`` times the norm of the weights they are added to."""
    pairs = {}
    for number, target in enumerate(targets):
        weight = base[f"{target}.weight"].double()
        a = normal(rank, weight.shape[1], seed=100 * seed + 2 * number, std=1.0)
        b = normal(weight.shape[0], rank, seed=100 * seed + 2 * number + 1, std=1.0)
        factor = ratio * float(weight.norm() / (b.double() @ a.double()).norm())
        pairs[target] = LowRank("linear", a, b * factor, alpha=float(rank))
    return Adapter(pairs)


def write_base(directory: Path, tensors, config=None):
    """Write one file, with a config beside it that names no architecture."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"model_type": "none"} if config is None else config))
    return directory


def write_shards(directory: Path, parts):
    """Write shards, a list of tensors by name, with their index."""
    directory.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for number, tensors in enumerate(parts, 1):
        name = f"model-{number:05}-of-{len(parts):05}.safetensors"
        save_file(tensors, directory / name)
        weight_map |= dict.fromkeys(tensors, name)
    write_index(directory, weight_map)
    return directory


def write_index(directory: Path, weight_map):
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def read_tensors(directory: Path):
    """Every tensor of a checkpoint, by the safetensors library."""
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        found |= load_file(path)
    return found


def raw(tensor):
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def assert_same(first, second):
    """Two sets of tensors are equal to the bit, zeros' signs and NaNs, too."""
    assert first.keys() == second.keys()
    for name in first:
        assert (first[name].dtype, first[name].shape) == (second[name].dtype, second[name].shape), name
        assert raw(first[name]) == raw(second[name]), name


def saved(adapter, directory):
    """Write an adapter as a directory, and return its path as a string."""
    lf.save(adapter, directory)
    return str(directory)


def snapshot(directory: Path):
    """Every path below a directory, hidden ones too, with what is there."""
    found = {}
    for top, folders, files in os.walk(directory):
        found |= {os.path.relpath(Path(top, name), directory): "directory" for name in folders}
        for name in files:
            path = Path(top, name)
            what = f"link to {path.readlink()}" if path.is_symlink() else hashlib.sha256(path.read_bytes()).hexdigest()
            found[os.path.relpath(path, directory)] = what
    return found
