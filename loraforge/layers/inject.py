"""Adapters in and out of a live model: the modules stay where they are and get a child ``lora`` and another forward."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType

import torch
from torch import Tensor, nn

from loraforge.adapter import Adapter, LowRank
from loraforge.errors import TargetError
from loraforge.layers.config import LoraConfig
from loraforge.layers.forward import Factors, adapted_forward
from loraforge.layers.kinds import factor_shapes, is_transposed, kind_of
from loraforge.layers.select import check_target, saved_modules, scales, select
from loraforge.layers.start import start_factors
from loraforge_registry.config import Settings


@dataclass(frozen=True)
class Injected:
    """An adapter in a model.

    ``whole`` maps keys as PEFT spells them to parameters of the base that the adapter replaces, ``before`` to what
    they were; ``frozen`` are the parameters that had gradients before.
    """

    model: nn.Module
    targets: Mapping[str, nn.Module]
    factors: Mapping[str, Factors]
    settings: Settings
    whole: Mapping[str, nn.Parameter]
    before: Mapping[str, Tensor]
    frozen: tuple[nn.Parameter, ...]

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return what is trained, by name."""
        found = {f"{n}.lora.{k}": p for n, lora in self.factors.items() for k, p in lora.named_parameters()}
        return found | dict(self.whole)

    def b_factors(self) -> set[str]:
        """Return the names of the B that LoRA+ trains faster: an embedding's is not the one that starts at zero."""
        return {f"{name}.lora.b" for name, lora in self.factors.items() if lora.kind != "embedding"}

    def buffers(self) -> dict[str, Tensor]:
        """Return what is part of the adapter and not trained, by name: the factors that PiSSA and OLoRA subtract."""
        return {f"{n}.lora.{k}": b for n, lora in self.factors.items() for k, b in lora.named_buffers()}

    def adapter(self) -> Adapter:
        """Return a copy of the adapter as it is now, as a plain one on the base as it was.

        Cost: copies every factor. PiSSA and OLoRA have twice their rank here.
        """
        return Adapter(
            targets={name: _plain(lora) for name, lora in self.factors.items()},
            settings=self.settings,
            extras={key: _copy(parameter) for key, parameter in self.whole.items()},
        )

    def remove(self) -> None:
        """Take the adapter out: module, weights and flags are then what they were, bit for bit."""
        for module in self.targets.values():
            del module.__dict__["forward"]
            del module.lora
        with torch.no_grad():
            for key, parameter in self.whole.items():
                parameter.copy_(self.before[key])
                parameter.requires_grad = False
                parameter.grad = None
        for parameter in self.frozen:
            parameter.requires_grad = True

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Let the model compute what it did without the adapter."""
        now = {key: _copy(parameter) for key, parameter in self.whole.items()}
        forwards = {name: module.__dict__.pop("forward") for name, module in self.targets.items()}
        self._fill(self.before)
        try:
            yield
        finally:
            self._fill(now)
            for name, module in self.targets.items():
                module.__dict__["forward"] = forwards[name]

    def _fill(self, values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for key, parameter in self.whole.items():
                parameter.copy_(values[key])


def inject(model: nn.Module, config: LoraConfig, *, base_name: str | None = None) -> Injected:
    """Put a new adapter into ``model`` to be trained, and freeze everything else.

    ``base_name`` is what the adapter will say its base is; without it, what transformers calls the model.

    Raises:
        TargetError: modules that cannot be adapted as asked; the model is then as it was.
    """
    modules = select(model, config)
    ranks = scales(config, modules)
    saved = saved_modules(model, config)
    started = {name: start_factors(name, module, *ranks[name], config) for name, module in modules.items()}
    factors = {name: Factors(pair, dropout=config.dropout, start=start) for name, (pair, start) in started.items()}
    settings = Settings(
        base_name=base_name or getattr(model, "name_or_path", None) or None,
        task_type=config.task_type,
        target_modules=tuple(modules),
        modules_to_save=tuple(sorted(saved)),  # in full: PEFT would also take "norm" for "input_layernorm"
        bias=config.bias,
        fan_in_fan_out=any(is_transposed(module) for module in modules.values()),
    )
    return _place(model, factors, settings, _whole(model, modules, saved, config.bias), trainable=True)


def attach(model: nn.Module, adapter: Adapter, *, dropout: float = 0.0, trainable: bool = True) -> Injected:
    """Put an adapter that exists into ``model``, to be trained on or, with ``trainable=False``, to be used.

    Numerics: factors keep their type, but half precision becomes float32 where it is to be trained.

    Raises:
        TargetError: a target, shape or extra tensor that the model has no place for; the model is then as it was.
    """
    settings = adapter.settings
    if settings.base_mutating_init or settings.token_indices:
        what = settings.base_mutating_init or "trainable_token_indices"
        raise TargetError(
            f"the adapter has {what!r}, which rewrites weights of the base; merge it with loraforge merge"
        )
    factors = {}
    for name, pair in sorted(adapter.targets.items()):
        factors[name] = Factors(_placed(model, name, pair, settings, trainable=trainable), dropout=dropout)
    parameters = dict(model.named_parameters())
    whole = {key: parameters.get(key.replace(".base_layer.", ".")) for key in adapter.extras}
    for key, parameter in whole.items():
        if parameter is None or parameter.shape != adapter.extras[key].shape:
            raise TargetError(
                f"the adapter's {key!r} of shape {list(adapter.extras[key].shape)} has no place in the model"
            )
    found = {key: parameter for key, parameter in whole.items() if parameter is not None}
    injected = _place(model, factors, settings, found, trainable=trainable)
    injected._fill(adapter.extras)  # noqa: SLF001 - this module's own class
    return injected


def _place(
    model: nn.Module,
    factors: Mapping[str, Factors],
    settings: Settings,
    whole: Mapping[str, nn.Parameter],
    *,
    trainable: bool,
) -> Injected:
    targets = {name: model.get_submodule(name) for name in factors}
    before = {key: _copy(parameter) for key, parameter in whole.items()}
    frozen = tuple(parameter for parameter in model.parameters() if parameter.requires_grad)
    model.requires_grad_(requires_grad=False)
    for parameter in whole.values():
        parameter.requires_grad_(trainable)
    for name, module in targets.items():
        module.add_module("lora", factors[name].requires_grad_(trainable).train(module.training))
        module.__dict__["forward"] = MethodType(adapted_forward, module)
    return Injected(model, targets, dict(factors), settings, whole, before, frozen)


def _placed(model: nn.Module, name: str, pair: LowRank, settings: Settings, *, trainable: bool) -> LowRank:
    """Check that a pair fits the module it names, and copy it to where that is."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise TargetError(f"the adapter's target {name!r} is not in the model; is this its base?") from None
    check_target(model, name, module)
    device = next(module.parameters(recurse=False)).device
    ops, shapes = kind_of(module), factor_shapes(module, pair.rank)
    if ops is None or ops.name != pair.kind or shapes != (tuple(pair.a.shape), tuple(pair.b.shape)):
        raise TargetError(
            f"target {name!r}: the adapter has A {list(pair.a.shape)} and B {list(pair.b.shape)}, the module needs "
            f"{list(shapes[0])} and {list(shapes[1])}; is this its base?"
        )
    if ops.name == "linear" and is_transposed(module) != settings.fan_in_fan_out:
        raise TargetError(
            f"target {name!r}: fan_in_fan_out of the adapter is not that of the module; is this its base?"
        )

    def moved(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        dtype = torch.float32 if trainable and tensor.dtype.itemsize < 4 else tensor.dtype
        return tensor.detach().to(device, dtype, copy=True)

    magnitude = None if pair.magnitude is None else pair.magnitude.flatten()
    a, b = moved(pair.a), moved(pair.b)
    assert a is not None  # noqa: S101 - for the type checker: only a tensor goes in
    assert b is not None  # noqa: S101 - as above
    return LowRank(pair.kind, a, b, pair.alpha, pair.rslora, moved(pair.bias), moved(magnitude))


def _whole(
    model: nn.Module, targets: Mapping[str, nn.Module], saved: Mapping[str, nn.Module], bias: str
) -> dict[str, nn.Parameter]:
    """Return the base's parameters that are trained as they are, by the key that PEFT saves them under."""
    found = {f"{name}.{key}": p for name, module in saved.items() for key, p in module.named_parameters()}
    for name, module in model.named_modules():
        parameter = module._parameters.get("bias")  # noqa: SLF001 - the module's own, not its children's
        key = f"{name}.base_layer.bias" if name in targets else f"{name}.bias".removeprefix(".")
        if parameter is not None and key not in found and (bias == "all" or (bias == "lora_only" and name in targets)):
            found[key] = parameter
    return found


def _plain(lora: Factors) -> LowRank:
    a, b, start = lora.a.detach(), lora.b.detach(), lora.start
    bias = None if lora.bias is None else _copy(lora.bias)
    magnitude = None if lora.magnitude is None else _magnitude_on_disk(lora)
    if start is None:
        return LowRank(lora.kind, _copy(a), _copy(b), lora.alpha, lora.rslora, bias, magnitude)
    ratio = 2**0.5 if lora.rslora else 2.0  # the same scale at twice the rank
    a2, b2 = torch.cat([a, start[0]]), torch.cat([b, -start[1]], dim=1)
    return LowRank(lora.kind, _copy(a2), _copy(b2), lora.alpha * ratio, lora.rslora, bias, magnitude)


def _magnitude_on_disk(lora: Factors) -> Tensor:
    """PEFT keeps a convolution's magnitudes as (1, out, 1, ...)."""
    assert lora.magnitude is not None  # noqa: S101 - the caller looked
    flat = _copy(lora.magnitude)
    return flat.view(1, -1, *(1,) * (lora.a.ndim - 2)) if lora.a.ndim > 2 else flat


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)
