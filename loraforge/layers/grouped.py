"""Several low-rank updates on one linear layer, each for its own rows of a batch (arXiv:2106.09685, eq. 3).

With ``x`` (n, in) in blocks ``x_k`` (n_k, in), and for each block the terms of ``loraforge.layers.linear``:

    z_k = m_k * x_k,   u_k = z_k A_k^T                                             (n_k, r_k)   u_k is kept
    y_k = x_k W^T + c + s_k c_k + g_k s_k u_k B_k^T - s_k x_k A0_k^T B0_k^T        (n_k, out)

and for ``dy`` (n, out), with ``v_k = dy_k B_k``:

    dB_k = g_k s_k dy_k^T u_k,   dA_k = g_k s_k v_k^T z_k,   dc_k = s_k sum dy_k
    dx_k = dy_k W + g_k s_k m_k * (v_k A_k) - s_k dy_k B0_k A0_k

Small blocks share the two products with W, whose weights are then read once; the rest is done block by block. No sum is
over rows of two blocks, so that a NaN in one reaches no other (to mask it with zeros would not do: 0 NaN is NaN).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from loraforge.layers.linear import Form, add_product

SHARED_ROWS = 512
"""Blocks share a product up to this many rows: more would fall out of the cache, and gain nothing."""


@dataclass(frozen=True, slots=True)
class Block:
    """The rows ``begin`` to ``end`` of the flattened input, and what is not a tensor of their update, if they have one.

    ``start`` holds the factors that PiSSA and OLoRA subtract.
    """

    begin: int
    end: int
    form: Form | None
    start: tuple[Tensor, Tensor] | None = None

    @property
    def rows(self) -> slice:
        """The rows."""
        return slice(self.begin, self.end)


Triple = tuple[Tensor | None, Tensor | None, Tensor | None]


class GroupedLinear(torch.autograd.Function):
    """``y`` above for ``x`` (..., in) -> (..., out); ``tensors`` are A_k, B_k and c_k of each block, or None.

    Numerics: as ``LoraLinear``, for each block in its own types. A block's result is that of its rows alone, to the
    rounding of a product with more rows.
    Cost: the base's product, and r_k (in + out) multiply-adds a row.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - torch's
        dtype: torch.dtype,
        blocks: Sequence[Block],
        x: Tensor,
        w: Tensor,
        c: Tensor | None,
        *tensors: Tensor | None,
    ) -> Tensor:
        """Compute ``y``."""
        rows = x.reshape(-1, x.shape[-1])
        w_, c_ = w.to(dtype), None if c is None else c.to(dtype)
        y = torch.empty(rows.shape[0], w.shape[0], dtype=dtype, device=x.device)
        kept: list[Tensor | None] = []
        for part, members in _runs(blocks, tensors):
            _product(rows[part].to(dtype), w_.T, c_, y[part])
            for block, (a, b, bias) in members:
                kept.append(_add_update(y[block.rows], rows[block.rows], block, a, b, bias))
        ctx.save_for_backward(x, w, *tensors, *kept)
        ctx.blocks = blocks
        return y.view(*x.shape[:-1], w.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - torch's
        """Compute ``dx``, ``dA_k``, ``dB_k`` and ``dc_k``."""
        blocks: Sequence[Block] = ctx.blocks
        x, w, *rest = ctx.saved_tensors
        tensors, kept = rest[: 3 * len(blocks)], iter(rest[3 * len(blocks) :])
        want_x = ctx.needs_input_grad[2]
        dy = dy.reshape(-1, dy.shape[-1])
        rows = x.reshape(-1, x.shape[-1])
        w_ = w.to(dy.dtype)
        dx = torch.empty(rows.shape, dtype=dy.dtype, device=dy.device) if want_x else None
        grads: list[Tensor | None] = []
        for part, members in _runs(blocks, tensors):
            if dx is not None:
                _product(dy[part], w_, None, dx[part])
            for block, triple in members:
                part_x = None if dx is None else dx[block.rows]
                grads += _gradients(part_x, dy[block.rows], rows[block.rows], block, triple, next(kept))
        return None, None, None if dx is None else dx.to(x.dtype).view(x.shape), None, None, *grads


grouped_linear: Callable[..., Tensor] = GroupedLinear.apply


def _runs(
    blocks: Sequence[Block], tensors: Sequence[Tensor | None]
) -> Iterator[tuple[slice, list[tuple[Block, Triple]]]]:
    """Put neighbours together that share a product with W."""
    run: list[tuple[Block, Triple]] = []
    for number, block in enumerate(blocks):
        if run and block.end - run[0][0].begin > SHARED_ROWS:
            yield slice(run[0][0].begin, run[-1][0].end), run
            run = []
        a, b, bias = tensors[3 * number : 3 * number + 3]
        run.append((block, (a, b, bias)))
    yield slice(run[0][0].begin, run[-1][0].end), run


def _product(left: Tensor, right: Tensor, c: Tensor | None, out: Tensor) -> None:
    """``out = left right + c``."""
    if c is None:
        torch.mm(left, right, out=out)
    else:
        torch.addmm(c, left, right, out=out)


def _add_update(
    y: Tensor, rows: Tensor, block: Block, a: Tensor | None, b: Tensor | None, bias: Tensor | None
) -> Tensor | None:
    """Add a block's update to ``y``, and return ``u``."""
    form = block.form
    if form is None or a is None or b is None:
        return None
    u = form.dropped(rows) @ a.to(form.lora).T
    add_product(y, u, b.to(form.lora).T, form.gain)
    if bias is not None:
        y.add_(bias.to(y.dtype), alpha=form.scale)
    if block.start is not None:
        a0, b0 = (t.to(form.lora) for t in block.start)
        add_product(y, rows.to(form.lora) @ a0.T, b0.T, -form.scale)
    return u


def _gradients(dx: Tensor | None, dy: Tensor, rows: Tensor, block: Block, triple: Triple, u: Tensor | None) -> Triple:
    """Return a block's dA, dB and dc, and add its update's part to ``dx``."""
    a, b, bias = triple
    form = block.form
    if form is None or a is None or b is None or u is None:
        return None, None, None
    dl = dy.to(form.lora)
    v = dl @ b.to(form.lora)
    db = (dl.T @ u).mul_(form.gain).to(b.dtype)
    mask = form.dropout.mask(rows, form.lora) if form.dropout else None
    if dx is not None:
        if mask is None:
            add_product(dx, v, a.to(form.lora), form.gain)
        else:
            dx.add_((v @ a.to(form.lora)).mul_(mask), alpha=form.gain)
        if block.start is not None:
            a0, b0 = (t.to(form.lora) for t in block.start)
            add_product(dx, dl @ b0, a0, -form.scale)
    z = rows.to(form.lora) if mask is None else mask.mul_(rows)
    da = (v.T @ z).mul_(form.gain).to(a.dtype)
    return da, db, None if bias is None else dy.sum(0).mul_(form.scale).to(bias.dtype)
