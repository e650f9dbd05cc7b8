"""Several adapters in one model at once, each for its own rows of a batch.

The model's modules stay what they are and get another forward, which asks ``Shared`` whose the rows at hand are.
Factors are no children of the model: it holds the base, once. Linear layers share the base's product; on every other
kind, and with DoRA, each block of rows goes through the module by itself.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from loraforge.adapter import Adapter
from loraforge.errors import TargetError
from loraforge.layers.config import LoraConfig
from loraforge.layers.dropout import Dropout, draw, fresh_seed
from loraforge.layers.forward import Factors, drops, form_of, run_adapted
from loraforge.layers.grouped import Block, grouped_linear
from loraforge.layers.inject import Injected, attach, inject
from loraforge.layers.kinds import kind_of
from loraforge.layers.narrow import SHARED, weight_in


class ApartError(Exception):
    """Rows of several adapters cannot be told apart, or not be put together; caught where they then take turns."""


@dataclass(frozen=True)
class Rows:
    """``count`` rows of a batch that are one adapter's, or with None the base's alone.

    Each was ``own`` long before it was filled up to ``width``.
    """

    name: str | None
    count: int
    own: int = 0
    width: int = 0


class Shared:
    """Several adapters in one model. Outside of ``rows`` and ``alone`` the model computes what it did without them."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.members: dict[str, Injected] = {}
        self.generators: dict[str, torch.Generator] = {}
        self._rows: tuple[Rows, ...] = ()
        self._alone = False
        self._seeds: dict[int, list[Dropout | None]] = {}
        self._modules: dict[str, nn.Module] = {}
        self._had_gradient = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def join(self, name: str, config: LoraConfig, adapter: Adapter | None = None) -> Injected:
        """Make room for an adapter: a new one by ``config``, or one that exists; random values are torch's default's.

        Raises:
            TargetError: the modules cannot be adapted as asked; the others stay as they are.
        """
        check_shareable(name, config, adapter)
        with self._lifted():
            one = inject(self.model, config) if adapter is None else attach(self.model, adapter, dropout=config.dropout)
            for module in one.targets.values():
                del module.__dict__["forward"]
                del module.lora
        self.members[name] = one
        self.generators[name] = torch.Generator()
        self._settle()
        return one

    def leave(self, name: str) -> None:
        """Give up an adapter's place."""
        del self.members[name], self.generators[name]
        self._settle()

    def close(self) -> None:
        """Take all adapters out: the model is then what it was, bit for bit."""
        self.members.clear()
        self._settle()
        for parameter in self._had_gradient:
            parameter.requires_grad = True

    @contextmanager
    def rows(self, rows: Sequence[Rows]) -> Iterator[None]:
        """Say whose the rows of the batch are that the model is about to see."""
        self._rows, self._seeds = tuple(rows), {}
        try:
            yield
        finally:
            self._rows, self._seeds = (), {}

    @contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """Say that all the model sees is one adapter's; random values are then torch's default's, as in its own run."""
        self._alone = True
        try:
            with self.rows([Rows(name, 0)]):
                yield
        finally:
            self._alone = False

    def forward(self, target: str, module: Any, x: Tensor) -> Tensor:  # noqa: ANN401 - of a known kind
        """Run a module: what takes the place of its forward."""
        found = [None if rows.name is None else self.members[rows.name].factors.get(target) for rows in self._rows]
        if all(lora is None for lora in found):
            y: Tensor = type(module).forward(module, x)
            return y
        if self._alone and found[0] is not None:  # to the bit what a run of its own does
            return run_adapted(module, found[0], x, draw(found[0].dropout) if drops(module) else None)
        if x.shape[0] != sum(rows.count for rows in self._rows):
            raise ApartError(f"the input of {target!r} has {x.shape[0]} rows, not those of the batch")
        dropouts = self._dropouts(module, found, x)
        ops = kind_of(module)
        if ops is not None and ops.name == "linear" and all(lora is None or lora.magnitude is None for lora in found):
            return self._linear(module, ops.weight(module), found, dropouts, x)
        blocks = torch.split(x, [rows.count for rows in self._rows])
        return torch.cat([_alone(module, *block) for block in zip(found, blocks, dropouts, strict=True)])

    def _linear(
        self,
        module: Any,  # noqa: ANN401 - as above
        w: Tensor,
        found: Sequence[Factors | None],
        dropouts: Sequence[Dropout | None],
        x: Tensor,
    ) -> Tensor:
        blocks, tensors, begin = [], list[Tensor | None](), 0
        each = math.prod(x.shape[1:-1])  # of the flattened rows, so many are one row of the batch
        for rows, lora, dropout in zip(self._rows, found, dropouts, strict=True):
            end = begin + rows.count * each
            form, start = (None, None) if lora is None else (form_of(lora, w, dropout), lora.start)
            blocks.append(Block(begin, end, form, start))
            tensors += (None, None, None) if lora is None else (lora.a, lora.b, lora.bias)
            begin = end
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else w.dtype
        with torch.autocast(device, enabled=False):
            return grouped_linear(dtype, blocks, x, weight_in(module, w, dtype), module.bias, *tensors)

    def _dropouts(self, module: nn.Module, found: Sequence[Factors | None], x: Tensor) -> list[Dropout | None]:
        """Return each block's dropout, from its adapter's own generator.

        A number of the default generator names the call: gradient checkpointing, which puts that generator back and
        calls again, finds the seeds of the first time.
        """
        if not drops(module) or not any(lora is not None and lora.dropout for lora in found):
            return [None] * len(found)
        call = fresh_seed()
        if call not in self._seeds:
            pairs = zip(self._rows, found, strict=True)
            self._seeds[call] = [
                None if lora is None or rows.name is None else draw(lora.dropout, self.generators[rows.name])
                for rows, lora in pairs
            ]
        return [_filled(*pair, x) for pair in zip(self._rows, self._seeds[call], strict=True)]

    @contextmanager
    def _lifted(self) -> Iterator[None]:
        """Let the modules look as they did, so that another adapter can be put in."""
        for module in self._modules.values():
            _restore(module)
        self._modules = {}
        try:
            yield
        finally:
            self._settle()

    def _settle(self) -> None:
        """Give every module that some adapter wants the shared forward, and the others back their own."""
        wanted = {name: module for one in self.members.values() for name, module in one.targets.items()}
        for name in self._modules.keys() - wanted.keys():
            _restore(self._modules[name])
        for name in wanted.keys() - self._modules.keys():
            wanted[name].__dict__ |= {"forward": partial(self.forward, name, wanted[name]), SHARED: True}
        self._modules = wanted


def _restore(module: nn.Module) -> None:
    del module.__dict__["forward"], module.__dict__[SHARED]


def check_shareable(name: str, config: LoraConfig, adapter: Adapter | None = None) -> None:
    """Refuse an adapter that trains tensors of the base, which the others use as they are.

    Raises:
        TargetError: naming what it trains.
    """
    extras: Mapping[str, object] = {} if adapter is None else adapter.extras
    what = "modules_to_save" if config.modules_to_save else f"bias={config.bias!r}" if config.bias != "none" else ""
    if what or extras:
        raise TargetError(
            f"{name}: {what or next(iter(extras))!s} trains tensors of the base itself, which the adapters beside it "
            "share: leave it out, or train this one alone"
        )


def _alone(module: Any, lora: Factors | None, x: Tensor, dropout: Dropout | None) -> Tensor:  # noqa: ANN401 - as above
    if lora is None:
        y: Tensor = type(module).forward(module, x)
        return y
    return run_adapted(module, lora, x, dropout)


def _filled(rows: Rows, dropout: Dropout | None, x: Tensor) -> Dropout | None:
    """Let a mask be that of the rows as they were before they were filled up."""
    if dropout is None or rows.own == rows.width or x.ndim != 3 or x.shape[1] != rows.width:
        return dropout
    return replace(dropout, padded=(rows.own, rows.width))
