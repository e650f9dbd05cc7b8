"""How fast does a live model go from one node of a tree to its sibling, beside PEFT doing the same?

A Llama of random weights in bfloat16 (2048 wide, 8 layers), two sibling adapters of rank 16 on the attention
projections, each in the store and as PEFT's directory. Ours: ``live.checkout`` from one to the other and
back, adapters in the cache, and with the cache emptied before each. PEFT's: unmerge and delete the adapter,
``load_adapter``, merge. The base's files are in the page cache. Beside it the time to copy the same bytes from one
place in memory to another.

To reach: at least 5 times faster than PEFT.

    python benchmarks/bench_tree.py [--rounds N]
"""

import os
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch

import loraforge as lf
from loraforge.tree import reshape
from loraforge_registry.manifest import Artifact

WIDE, LAYERS, RANK = 2048, 8, 16
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def main() -> int:
    """Print the figures."""
    warnings.simplefilter("ignore")
    rounds = int(sys.argv[sys.argv.index("--rounds") + 1]) if "--rounds" in sys.argv else 7
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))  # noqa: S108 - in memory
    try:
        model, size = make_base(folder / "base")
        adapters = [make_adapter(model, folder / name, seed) for seed, name in enumerate(("one", "two"))]
        ours = time_ours(model, folder, adapters, rounds)
        theirs = time_peft(model, adapters, rounds)
    finally:
        shutil.rmtree(folder)
    copy = time_copy(size, rounds)
    print(
        f"between siblings, {size / 1e6:.0f} MB of attention weights, {torch.get_num_threads()} threads; median of "
        f"{rounds}"
    )
    for name, seconds in (
        ("loraforge, adapters cached", ours[0]),
        ("loraforge, adapters read", ours[1]),
        ("PEFT", theirs),
    ):
        print(f"{name:28}{seconds * 1e3:9.0f} ms{theirs / seconds:8.1f} x{size / seconds / 1e9:8.2f} GB/s")
    print(f"{'a copy of the same bytes':28}{copy * 1e3:9.0f} ms{'':10}{size / copy / 1e9:8.2f} GB/s")
    return 0


def make_base(folder: Path) -> tuple[Any, int]:
    """Make a model and its checkpoint; return it, and the bytes of its attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=WIDE, intermediate_size=2 * WIDE, num_hidden_layers=LAYERS, num_attention_heads=16,
        num_key_value_heads=16, vocab_size=1024, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    model.save_pretrained(folder)
    return model, sum(p.nbytes for name, p in model.named_parameters() if name.split(".")[-2] in ATTENTION)


def make_adapter(model: Any, folder: Path, seed: int) -> Path:  # noqa: ANN401 - transformers' models have no types here
    """Write an adapter with random factors."""
    from loraforge.adapter import Adapter, LowRank
    from loraforge_registry.config import Settings

    draw = torch.Generator().manual_seed(seed)
    targets = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in ATTENTION:
            out, inner = module.weight.shape
            a, b = torch.randn(RANK, inner, generator=draw), torch.randn(out, RANK, generator=draw) * 1e-4
            targets[name] = LowRank("linear", a, b, alpha=2.0 * RANK)
    lf.save(Adapter(targets, Settings(task_type="CAUSAL_LM")), folder)
    return folder


def time_ours(model: Any, folder: Path, adapters: list[Path], rounds: int) -> tuple[float, float]:  # noqa: ANN401 - as above
    """Return the median time of a move with the adapters opened, and with each to be read."""
    registry = lf.Registry(folder / "store")
    tree = lf.Tree.create(registry, "tree", folder / "base")
    for path in adapters:
        digest = registry.push(path)
        reshape.graft(tree, path.name, Artifact(digest, registry.store.manifest(digest).content_id))
    with tree.live(model) as live:
        for path in adapters:
            live.checkout(path.name)
        cached = timed(lambda number: live.checkout(adapters[number % 2].name), rounds)

        def anew(number: int) -> None:
            tree.cache.clear()
            live.checkout(adapters[number % 2].name)

        return cached, timed(anew, rounds)


def time_peft(model: Any, adapters: list[Path], rounds: int) -> float:  # noqa: ANN401 - as above
    """Return the median time of unload, load_adapter and merge."""
    from peft import PeftModel

    now = PeftModel.from_pretrained(model, str(adapters[0]), adapter_name="node0")
    now.merge_adapter()

    def switch(number: int) -> None:
        now.unmerge_adapter()
        now.load_adapter(str(adapters[(number + 1) % 2]), adapter_name=f"node{number + 1}")
        now.delete_adapter(f"node{number}")
        now.set_adapter(f"node{number + 1}")
        now.merge_adapter()

    found = timed(switch, rounds)
    now.unmerge_adapter()
    now.unload()
    return found


def time_copy(size: int, rounds: int) -> float:
    """Return the median time of copying that many bytes in memory."""
    source, target = torch.ones(size, dtype=torch.uint8), torch.empty(size, dtype=torch.uint8)
    return timed(lambda _: target.copy_(source), rounds)


def timed(work: Callable[[int], object], rounds: int) -> float:
    """Return the median time of a few runs, after one that does not count."""
    seconds = []
    for number in range(rounds + 1):
        start = time.perf_counter()
        work(number)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


if __name__ == "__main__":
    sys.exit(main())
