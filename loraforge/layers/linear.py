"""LoRA on a linear layer, forward and backward by hand (arXiv:2106.09685, eq. 3).

With ``x`` (n, in), the frozen ``W`` (out, in) and ``c``, a vector or none, ``m`` the dropout mask, ``g`` its gain, and
``A0``, ``B0`` the frozen start of a factorised initialisation (PiSSA, OLoRA) or none:

    z  = m * x                                   (n, in)    remade in the backward pass
    u  = z A^T                                   (n, r)     kept: r / in of the input
    y  = x W^T + c + g s u B^T - s x A0^T B0^T   (n, out)

and for ``dy`` (n, out), with ``v = dy B`` (n, r):

    dB = g s dy^T u                              (out, r)
    dA = g s v^T z                               (r, in)
    dx = dy W + g s m * (v A) - s dy B0 A0       (n, in)
    dc = sum_n dy

Autograd on the same formula keeps ``z`` and the mask for each layer; here all layers that read one ``x`` keep that
one tensor. ``W`` is frozen: it has no gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor
from torch.autograd.function import once_differentiable

from loraforge.layers.dropout import Dropout


@dataclass(frozen=True, slots=True)
class Form:
    """What of the formula is not a tensor; ``base`` and ``lora`` are the types the two products are done in."""

    scale: float
    dropout: Dropout | None
    base: torch.dtype
    lora: torch.dtype

    @property
    def gain(self) -> float:
        """``g s``."""
        return self.scale * (self.dropout.gain if self.dropout else 1.0)

    def dropped(self, x: Tensor) -> Tensor:
        """``z``."""
        x = x.to(self.lora)
        return x if self.dropout is None else self.dropout.mask(x, self.lora).mul_(x)


class LoraLinear(torch.autograd.Function):
    """``y`` above for ``x`` (..., in) -> (..., out).

    Numerics: products in ``form.base`` and ``form.lora``; gradients in the type of what they belong to.
    Cost: the base's product, r (in + out) multiply-adds a row, and the mask twice.
    """

    @staticmethod
    def forward(  # noqa: PLR0913, PLR0917 - the tensors of the formula; autograd takes no records
        ctx: Any,  # noqa: ANN401 - torch's
        form: Form,
        x: Tensor,
        w: Tensor,
        c: Tensor | None,
        a: Tensor,
        b: Tensor,
        start: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """Compute ``y``."""
        rows = x.reshape(-1, x.shape[-1])
        y = F.linear(rows.to(form.base), w.to(form.base), None if c is None else c.to(form.base))
        u = form.dropped(rows) @ a.to(form.lora).T
        add_product(y, u, b.to(form.lora).T, form.gain)
        if start is not None:
            a0, b0 = (t.to(form.lora) for t in start)
            add_product(y, rows.to(form.lora) @ a0.T, b0.T, -form.scale)
        ctx.save_for_backward(x, w, a, b, u)
        ctx.form, ctx.start = form, start
        return y.view(*x.shape[:-1], w.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - torch's
        """Compute ``dx``, ``dc``, ``dA`` and ``dB``."""
        x, w, a, b, u = ctx.saved_tensors
        form: Form = ctx.form
        _, want_x, _, want_c, want_a, want_b, _ = ctx.needs_input_grad
        dy = dy.reshape(-1, dy.shape[-1])
        rows = x.reshape(-1, x.shape[-1])
        dl = dy.to(form.lora)
        db = (dl.T @ u).mul_(form.gain).to(b.dtype) if want_b else None
        dc = dy.sum(0) if want_c else None
        v = dl @ b.to(form.lora)
        mask = form.dropout.mask(rows, form.lora) if form.dropout else None
        dx = None
        if want_x:
            dx = dy @ w.to(dy.dtype)
            if mask is None:
                add_product(dx, v, a.to(form.lora), form.gain)
            else:
                dx.add_((v @ a.to(form.lora)).mul_(mask), alpha=form.gain)
            if ctx.start is not None:
                a0, b0 = (t.to(form.lora) for t in ctx.start)
                add_product(dx, dl @ b0, a0, -form.scale)
            dx = dx.to(x.dtype).view(x.shape)
        da = None
        if want_a:
            z = rows.to(form.lora) if mask is None else mask.mul_(rows)
            da = (v.T @ z).mul_(form.gain).to(a.dtype)
        return None, dx, None, dc, da, db, None


lora_linear: Callable[..., Tensor] = LoraLinear.apply


def add_product(y: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """``y += scale * left @ right``, in one kernel where the types agree."""
    if y.dtype == left.dtype:
        y.addmm_(left, right, alpha=scale)
    else:
        y.add_(left @ right, alpha=scale)
