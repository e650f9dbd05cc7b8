"""How factors start: B A = 0, or the leading part of the base weight, subtracted from the base in turn.

    kaiming    A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0           (loralib and PEFT; embeddings: A = 0, B ~ N(0, 1))
    gaussian   A ~ N(0, 1/r), B = 0                            (PEFT: a standard deviation of 1/r)
    pissa      W = U S V^T: B = U_r sqrt(S_r / s), A = sqrt(S_r / s) V_r^T              (arXiv:2404.02948, eq. 2 and 3)
    olora      W = Q R: B = Q_r, A = R_r                                                (arXiv:2406.01775, section 3)

PiSSA and OLoRA rewrite the base to ``W - s B0 A0`` in PEFT. Here the base stays as it is and the layer subtracts
``s B0 A0``, so that nothing is rounded, and what was trained is a plain adapter of rank 2r: ``[A; A0]``, ``[B, -B0]``.
"""

import math

import torch
from torch import Tensor, nn

from loraforge.adapter import LowRank
from loraforge.errors import TargetError
from loraforge.layers.config import FACTORISED, Init, LoraConfig
from loraforge.layers.kinds import factor_shapes, kind_of

Start = tuple[Tensor, Tensor]


def start_factors(
    name: str, module: nn.Module, rank: int, alpha: float, config: LoraConfig
) -> tuple[LowRank, Start | None]:
    """Return the factors that training of ``module`` starts from, and what is to be subtracted of them, if anything.

    Numerics: float32 for a base of half precision, else the base's own type. Random values are drawn from torch's
    default generator.

    Raises:
        TargetError: an initialisation or a rank that this module cannot have.
    """
    ops = kind_of(module)
    assert ops is not None, "targets were checked"  # noqa: S101 - the caller's contract
    w = ops.weight(module).detach()
    _check(name, module, rank, config, w)
    dtype = torch.float32 if w.dtype.itemsize < 4 else w.dtype
    if config.init in FACTORISED:
        a, b = _factorise(w.to(dtype), rank, config.scale(alpha, rank), config.init)
        start = (a.clone(), b.clone())
    else:
        a, b = _zero_product(module, rank, config.init, dtype)
        start = None
    bias = torch.zeros(w.shape[0], dtype=dtype, device=w.device) if config.lora_bias else None
    magnitude = _magnitude(w.to(dtype)) if config.dora else None
    return LowRank(ops.name, a, b, alpha, config.rslora, bias, magnitude), start


def _zero_product(module: nn.Module, rank: int, init: Init, dtype: torch.dtype) -> Start:
    shape_a, shape_b = factor_shapes(module, rank)
    device = next(module.parameters()).device
    a, b = (torch.zeros(shape, dtype=dtype, device=device) for shape in (shape_a, shape_b))
    if isinstance(module, nn.Embedding):
        return a, b.normal_()
    if init == "gaussian":
        return a.normal_(std=1 / rank), b
    return nn.init.kaiming_uniform_(a, a=math.sqrt(5)), b


def _factorise(w: Tensor, rank: int, scale: float, init: Init) -> Start:
    """Return A0 and B0 with ``s B0 A0`` the leading part of W (out, in)."""
    if init == "olora":
        q, r = torch.linalg.qr(w)
        return r[:rank].contiguous(), q[:, :rank].contiguous()
    u, s, vt = torch.linalg.svd(w, full_matrices=False)
    root = (s[:rank] / abs(scale)).sqrt()
    return root[:, None] * vt[:rank], math.copysign(1.0, scale) * u[:, :rank] * root


def _magnitude(w: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(w.flatten(1), dim=1)
    return norm


def _check(name: str, module: nn.Module, rank: int, config: LoraConfig, w: Tensor) -> None:
    groups = int(getattr(module, "groups", 1))
    embedding = isinstance(module, nn.Embedding)
    plain = w.ndim == 2 and not embedding
    if rank % groups:
        raise TargetError(f"target {name!r} is a convolution of {groups} groups: its rank, {rank}, must divide by them")
    if groups > 1 and config.dora:
        raise TargetError(f"target {name!r} is a grouped convolution, for which DoRA is not defined; exclude it")
    if embedding and config.lora_bias:
        raise TargetError(f"target {name!r} is an embedding: lora_bias is not for those; exclude it")
    if config.init in FACTORISED and not plain:
        raise TargetError(f"target {name!r}: init={config.init!r} is for linear layers; exclude it, or use kaiming")
    if config.init in FACTORISED and rank > min(w.shape):
        raise TargetError(f"target {name!r} of shape {list(w.shape)} has no {rank} leading directions; lower the rank")
