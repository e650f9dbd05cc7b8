"""The forward of an adapted module: plain LoRA on a linear layer by hand, every other kind and DoRA by recomputing.

With ``z`` the dropped-out input and ``D(z) = s low_rank(z, A, B)``:

    LoRA  y = base(x) + c + D(z)
    DoRA  y = base(x) + c + (g - 1) base(z) + g D(z),   g = m / |W + s B A|   (arXiv:2402.09353, eq. 5)

with ``|.|`` the norm over each output's weights, held constant in the backward pass as in section 4.3 of the paper.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from loraforge.adapter import LowRank
from loraforge.layers.dropout import Dropout, draw
from loraforge.layers.kinds import Ops, kind_of
from loraforge.layers.linear import Form, lora_linear
from loraforge.layers.narrow import weight_in
from loraforge_registry.config import scale_of


class Factors(nn.Module):
    """The parameters of one low-rank update, as the child ``lora`` of the module that it adapts.

    ``start`` holds the factors of a factorised initialisation: they are subtracted: training starts at the base.
    """

    start_a: Tensor | None
    start_b: Tensor | None

    def __init__(self, pair: LowRank, *, dropout: float = 0.0, start: tuple[Tensor, Tensor] | None = None) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(pair.a), nn.Parameter(pair.b)
        self.bias = None if pair.bias is None else nn.Parameter(pair.bias)
        self.magnitude = None if pair.magnitude is None else nn.Parameter(pair.magnitude)
        self.kind, self.alpha, self.rslora, self.dropout = pair.kind, pair.alpha, pair.rslora, dropout
        self.register_buffer("start_a", start[0] if start else None, persistent=False)
        self.register_buffer("start_b", start[1] if start else None, persistent=False)

    @property
    def scale(self) -> float:
        """``alpha / r``, or ``alpha / sqrt(r)`` with rsLoRA."""
        return scale_of(self.alpha, self.a.shape[0], rslora=self.rslora)

    @property
    def start(self) -> tuple[Tensor, Tensor] | None:
        """``A0``, ``B0``, or None."""
        return None if self.start_a is None or self.start_b is None else (self.start_a, self.start_b)


def adapted_forward(module: Any, x: Tensor) -> Tensor:  # noqa: ANN401 - a module with the child ``lora``
    """Run an adapted module: what takes the place of its forward.

    Numerics: under autocast in its type; else the base in its own and the update in the factors'. The result has the
    type that the base's has.
    """
    lora: Factors = module.lora
    return run_adapted(module, lora, x, draw(lora.dropout) if drops(module) else None)


def drops(module: nn.Module) -> bool:
    """Whether a module's input may be dropped out: row numbers never are."""
    return module.training and not isinstance(module, nn.Embedding)


def run_adapted(module: Any, lora: Factors, x: Tensor, dropout: Dropout | None) -> Tensor:  # noqa: ANN401 - of a known kind
    """Run a module with the update of ``lora``."""
    ops = kind_of(module)
    assert ops is not None, "only modules of a known kind are adapted"  # noqa: S101 - the injection's contract
    if lora.magnitude is not None:
        return _dora(ops, module, lora, x, dropout)
    if ops.name == "linear":
        return _linear(ops, module, lora, x, dropout)
    y: Tensor = type(module).forward(module, x)
    return y.add(_update(ops, module, lora, x, dropout).to(y.dtype))


def form_of(lora: Factors, w: Tensor, dropout: Dropout | None) -> Form:
    """Return the form of a linear update: under autocast both products are done in its type."""
    device = w.device.type
    auto = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return Form(lora.scale, dropout, auto or w.dtype, auto or lora.a.dtype)


def _linear(ops: Ops, module: Any, lora: Factors, x: Tensor, dropout: Dropout | None) -> Tensor:  # noqa: ANN401 - as above
    w, device = ops.weight(module), x.device.type
    form, c = form_of(lora, w, dropout), module.bias
    if lora.bias is not None:
        c = lora.scale * lora.bias if c is None else c + lora.scale * lora.bias
    with torch.autocast(device, enabled=False):
        return lora_linear(form, x, weight_in(module, w, form.base), c, lora.a, lora.b, lora.start)


def _update(ops: Ops, module: Any, lora: Factors, x: Tensor, dropout: Dropout | None) -> Tensor:  # noqa: ANN401 - as above
    def formula(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return ops.low_rank(module, _dropped(x, a.dtype, dropout), a, b).mul(lora.scale)

    update = recomputed(formula, x, lora.a, lora.b)
    return update if lora.bias is None else update + ops.spread(lora.scale * lora.bias)


def _dora(ops: Ops, module: Any, lora: Factors, x: Tensor, dropout: Dropout | None) -> Tensor:  # noqa: ANN401 - as above
    c = getattr(module, "bias", None)
    norm = weight_norm(ops.weight(module), lora.a, lora.b, lora.scale)

    def formula(x: Tensor, a: Tensor, b: Tensor, magnitude: Tensor) -> Tensor:
        g: Tensor = ops.spread(magnitude / norm)
        z = _dropped(x, a.dtype, dropout)
        y = ops.base(module, x)
        update = ops.low_rank(module, z, a, b) * float(lora.scale)
        if dropout is None:
            return (g * (y + update)).to(y.dtype)
        return (y + (g - 1) * ops.base(module, z.to(x.dtype)) + g * update).to(y.dtype)

    y = recomputed(formula, x, lora.a, lora.b, lora.magnitude)
    return y if c is None else y + ops.spread(c).to(y.dtype)


def _dropped(x: Tensor, dtype: torch.dtype, dropout: Dropout | None) -> Tensor:
    """``z`` in the factors' type; row numbers stay what they are."""
    if not x.is_floating_point():
        return x
    z = x.to(dtype)
    return z if dropout is None else z * dropout.mask(x, dtype).mul_(dropout.gain)


@torch.no_grad()
def weight_norm(w: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return ``|W + s B A|`` for each output, without forming the sum: |W|^2 + 2 s <W A^T, B> + s^2 <B A A^T, B>.

    Shapes: w (out, n...), a (r, n...), b (out, r...) -> (out,).
    Numerics: in the type of the factors, float32 at least.
    Cost: out * n * r multiply-adds.
    """
    a, b = a.flatten(1), b.flatten(1)
    w = w.flatten(1).to(a.dtype)
    cross = ((w @ a.T) * b).sum(1)
    square = ((b @ (a @ a.T)) * b).sum(1)
    total = torch.linalg.vector_norm(w, dim=1).square() + 2 * scale * cross + scale**2 * square
    norm: Tensor = total.clamp_min(torch.finfo(total.dtype).tiny).sqrt()
    return norm


Formula = Callable[..., Tensor]


class Recomputed(torch.autograd.Function):
    """``formula(x, *parameters)``, of which only the arguments are kept: the backward pass computes it again."""

    @staticmethod
    def forward(ctx: Any, formula: Formula, x: Tensor, *parameters: Tensor) -> Tensor:  # noqa: ANN401 - torch's
        """Compute it, and keep the arguments."""
        device = x.device.type
        ctx.save_for_backward(x, *parameters)
        ctx.formula = formula
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        return formula(x, *parameters)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - torch's
        """Compute it again with gradients."""
        wanted = ctx.needs_input_grad[1:]
        inputs = [t.detach().requires_grad_(want) for t, want in zip(ctx.saved_tensors, wanted, strict=True)]
        device, dtype, enabled = ctx.autocast
        with torch.enable_grad(), torch.autocast(device, dtype=dtype, enabled=enabled):
            y = ctx.formula(*inputs)
        grads = iter(torch.autograd.grad(y, [t for t in inputs if t.requires_grad], dy))
        return None, *(next(grads) if want else None for want in wanted)


recomputed: Callable[..., Tensor] = Recomputed.apply
