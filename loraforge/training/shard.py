"""A base that does not fit on one device, shared out over all of them by PyTorch's FSDP2 (arXiv:2304.11277).

Each process holds a part of every frozen weight; a block's weights are gathered when it is run, and let go behind it.
The adapter, small as it is, is whole on every process, and its gradients are added up as ever (``ranks``). Since
gathering needs everybody, all processes run the model equally often (``step``).
"""

from collections.abc import Iterable

import torch
from torch import nn

from loraforge.errors import TrainingError
from loraforge.training import ranks


def check_shardable() -> None:
    """Refuse one process alone.

    Raises:
        TrainingError: there is nobody to share with.
    """
    if ranks.size() == 1:
        raise TrainingError("shard shares the base out over several processes: start it with torchrun")


def shard(model: nn.Module, whole: Iterable[nn.Parameter], device: torch.device) -> None:
    """Share a model's parameters out over all processes, but for those in ``whole``; it stays so.

    Cost: a device never holds more than its share and one block.
    """
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415 - only who shares needs them
    from torch.distributed.fsdp import fully_shard  # noqa: PLC0415

    apart = set(whole)
    mesh = init_device_mesh(device.type, (ranks.size(),))
    for block in _blocks(model):
        fully_shard(block, mesh=mesh, ignored_params=apart)
    fully_shard(model, mesh=mesh, ignored_params=apart)
    for parameter in apart:
        parameter.data = parameter.data.to(device)


def is_sharded(model: nn.Module) -> bool:
    """Whether a model's parameters are shared out."""
    if ranks.size() == 1:
        return False
    from torch.distributed.fsdp import FSDPModule  # noqa: PLC0415 - as above

    return isinstance(model, FSDPModule)


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks that are gathered one at a time, inner ones first: what transformers never splits, else lists."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    named = [module for module in model.modules() if type(module).__name__ in names and module is not model]
    listed = [block for module in model.modules() if isinstance(module, nn.ModuleList) for block in module]
    return (named or listed)[::-1]
