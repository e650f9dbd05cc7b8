"""Two processes with unequal shares of the labels give what one gives."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

import loraforge as lf
from loraforge.training import TrainConfig, train

ROOT = Path(__file__).parents[3]
SCRIPT = """
import sys, pickle, torch
sys.path[:0] = sys.argv[2:]
import torch.distributed as dist
dist.init_process_group("gloo")
torch.set_num_threads(1)
from tests.unit.training.test_ranks import gradient, run
torch.save({"gradient": gradient()}, f"{sys.argv[1]}/gradient-{dist.get_rank()}")
adapter = run(sys.argv[1])
import loraforge as lf
lf.save(adapter, f"{sys.argv[1]}/adapter-{dist.get_rank()}")
dist.barrier()
dist.destroy_process_group()
"""


def batches():
    """Micro-batches of one to nine rows."""
    generator = torch.Generator().manual_seed(0)
    sizes = [1, 9, 2, 7, 3, 3, 8, 1, 4]
    return [{"x": torch.randn(n, 8, generator=generator), "labels": torch.arange(n) % 3} for n in sizes]


def gradient():
    from loraforge.training.step import window_gradient
    from tests.unit.training.test_loop import net

    model = net().eval()
    injected = lf.inject(model, lf.LoraConfig(rank=2, init="pissa"))
    loss, labels = window_gradient(model, batches()[:3], lambda _, batch: len(batch["labels"]), None)
    return torch.cat([torch.tensor([loss, labels]), *[p.grad.flatten() for p in injected.parameters().values()]])


def run(folder, accumulate=2):
    from tests.unit.training.test_loop import net

    torch.set_num_threads(1)
    model = net()
    model.drop.p = 0.0
    config = TrainConfig(rank=2, lr=1e-2, epochs=2, grad_accum=accumulate, save_every=1, keep=9, seed=3)
    return train(model, batches(), config, valid=batches(), run=None if folder is None else f"{folder}/run")


def torchrun(*arguments):
    """Run something in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "registry", ROOT / "cli")))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    return subprocess.run(
        [*command, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_two_processes_are_one_with_twice_the_micro_batches(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(SCRIPT)
    done = torchrun(script, tmp_path, ROOT, ROOT / "registry")
    assert done.returncode == 0, done.stderr[-3000:]
    one = gradient()
    for rank in (0, 1):
        two = torch.load(tmp_path / f"gradient-{rank}", weights_only=True)["gradient"]
        assert float((two - one).norm() / one.norm()) < 1e-6
    first, second = (lf.load(tmp_path / f"adapter-{rank}") for rank in (0, 1))
    assert lf.content_id(first) == lf.content_id(second)
    alone = run(None, accumulate=4)
    for name, pair in alone.targets.items():
        assert torch.allclose(pair.delta(), first.targets[name].delta(), rtol=1e-4, atol=1e-6)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["tokens"] for line in lines] == [19, 15, 4] * 2
    assert [path.name for path in sorted((tmp_path / "run").glob("step-*"))][-1] == "step-0000006"
