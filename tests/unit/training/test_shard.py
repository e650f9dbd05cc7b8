"""A base that is shared out over two processes trains the adapter that one process trains."""

import pytest
import torch

import loraforge as lf
from loraforge.errors import TrainingError
from loraforge.training import TrainConfig, train
from loraforge.training.step import window_gradient
from tests.unit.training.test_ranks import ROOT, torchrun

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own remarks
SCRIPT = """
import sys, torch
sys.path[:0] = sys.argv[2:]
import torch.distributed as dist
dist.init_process_group("gloo")
torch.set_num_threads(1)
from tests.unit.training import test_shard as here
torch.save({"gradient": here.gradient(shared=True)}, f"{sys.argv[1]}/gradient-{dist.get_rank()}")
import loraforge as lf
for precision in ("fp32", "bf16"):
    lf.save(here.run(precision, shard=True), f"{sys.argv[1]}/{precision}-{dist.get_rank()}")
dist.barrier()
dist.destroy_process_group()
"""


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, tie_word_embeddings=True, **sizes))


def batches():
    """Micro-batches of one to four rows, one of them with nothing to learn."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for rows in (1, 4, 2, 3, 1):
        ids = torch.randint(64, (rows, 9), generator=generator)
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()})
    found[3]["labels"][:] = -100
    return found


def gradient(*, shared):
    from loraforge.training.batches import count_labels
    from loraforge.training.shard import shard

    model = llama().eval()
    injected = lf.inject(model, lf.LoraConfig(rank=2, targets="all-linear"))
    with torch.no_grad():
        for number, (_, parameter) in enumerate(sorted(injected.parameters().items())):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.1)
    if shared:
        shard(model, injected.parameters().values(), torch.device("cpu"))
        held = sum(p.to_local().numel() for p in model.parameters() if hasattr(p, "to_local"))
        assert 0.4 < held / sum(p.numel() for p in llama().parameters()) < 0.6
    loss, labels = window_gradient(model, batches()[:3], count_labels, None)
    grads = [parameter.grad.flatten() for _, parameter in sorted(injected.parameters().items())]
    return torch.cat([torch.tensor([loss, labels]), *grads])


def run(precision, *, shard):
    """Windows of four micro-batches and of one: on two processes, one of them has nothing in the second."""
    config = TrainConfig(
        rank=2, lr=1e-2, epochs=2, grad_accum=2 if shard else 4, seed=3, precision=precision, shard=shard
    )
    return train(llama(), batches(), config, valid=batches()[:3])


def test_two_processes_that_share_the_base_are_one(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(SCRIPT)
    done = torchrun(script, tmp_path, ROOT, ROOT / "registry")
    assert done.returncode == 0, done.stderr[-3000:]
    one = gradient(shared=False)
    for rank in (0, 1):
        two = torch.load(tmp_path / f"gradient-{rank}", weights_only=True)["gradient"]
        assert float((two - one).norm() / one.norm()) < 1e-6
    for precision, near in (("fp32", 1e-4), ("bf16", 0.1)):
        first, second = (lf.load(tmp_path / f"{precision}-{rank}") for rank in (0, 1))
        assert lf.content_id(first) == lf.content_id(second)
        alone = run(precision, shard=False)
        for name, pair in alone.targets.items():
            lost = (pair.delta() - first.targets[name].delta()).norm() / pair.delta().norm()
            assert float(lost) < near, (precision, name)


def test_there_must_be_somebody_to_share_with():
    with pytest.raises(TrainingError, match="torchrun"):
        train(llama(), batches(), TrainConfig(shard=True))
    with pytest.raises(TrainingError, match="exclude each other"):
        TrainConfig(shard=True, compile=True)
