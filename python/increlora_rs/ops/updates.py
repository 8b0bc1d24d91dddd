"""The arithmetic of the updates of embeddings and convolutions: output, gradients, importance
``sum |dW * dLoss/d(dW)|``, sketch of the gradient. No autograd and no state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn import grad as of

from .._core import RESERVE_E
from ..gauges.sketch import Sketch

CONVOLUTIONS: dict[int, Any] = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_WEIGHT_GRADIENTS: dict[int, Any] = {1: of.conv1d_weight, 2: of.conv2d_weight, 3: of.conv3d_weight}
_INPUT_GRADIENTS: dict[int, Any] = {1: of.conv1d_input, 2: of.conv2d_input, 3: of.conv3d_input}


class Geometry(NamedTuple):
    """Where the kernel of a convolution goes, a number a dimension."""

    kernel_size: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]


def geometry_of(base: Any, x: Tensor) -> tuple[Geometry, Tensor]:
    """That of a convolution module, and its input: padded where it does not pad with zeros on both sides
    alike."""
    padding = base.padding
    if base.padding_mode != "zeros" or isinstance(padding, str):
        mode = "constant" if base.padding_mode == "zeros" else base.padding_mode
        x = functional.pad(x, base._reversed_padding_repeated_twice, mode=mode)
        padding = (0,) * len(base.kernel_size)
    return Geometry(base.kernel_size, base.stride, padding, base.dilation), x


def _e_of_all(e: Tensor, rows: int) -> Tensor:
    """E with the constant of the reserve."""
    reserve = rows - e.shape[0]
    return torch.cat([e.view(-1), e.new_full((reserve,), RESERVE_E)]) if reserve else e.view(-1)


def scaled_b(a: Tensor, b: Tensor, e: Tensor, scale: float) -> Tensor:
    """``P = s B diag(E)``, so that dW = P A: (out, rows)."""
    return b * (_e_of_all(e, a.shape[0]) * scale)


def _through_scaled_b(gp: Tensor, a: Tensor, b: Tensor, e: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Gradients of B and E from that of P."""
    gb = gp * (_e_of_all(e, a.shape[0]) * scale)
    ge = ((gp * b).sum(0) * scale)[: e.shape[0]]
    return gb, ge.view_as(e)


def embedding(
    ids: Tensor,
    a: Tensor,
    b: Tensor,
    e: Tensor,
    scale: float,
    padding_idx: int | None,
    scale_grad_by_freq: bool,
) -> Tensor:
    """``s B (E * A[:, id])`` for each id: (*ids, out)."""
    t = functional.embedding(ids, a.t(), padding_idx=padding_idx, scale_grad_by_freq=scale_grad_by_freq)
    return t @ scaled_b(a, b, e, scale).t()


def embedding_gradients(
    gy: Tensor,
    ids: Tensor,
    a: Tensor,
    b: Tensor,
    e: Tensor,
    scale: float,
    padding_idx: int | None,
    scale_grad_by_freq: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of A, B and E for that of the update."""
    gy, ids = gy.reshape(-1, gy.shape[-1]).to(b.dtype), ids.flatten()
    gt = gy @ scaled_b(a, b, e, scale)
    padding = -1 if padding_idx is None else padding_idx % a.shape[1]
    ga = torch.ops.aten.embedding_dense_backward(gt, ids, a.shape[1], padding, scale_grad_by_freq).t()
    gb, ge = _through_scaled_b(gy.t() @ a.t()[ids], a, b, e, scale)
    return ga.contiguous(), gb, ge


def embedding_importance(gy: Tensor, scale: float, ids: Tensor, a: Tensor, b: Tensor, e: Tensor) -> Tensor:
    """The importance that one backward pass adds, float64."""
    # Rows of dW that no id asks for have no gradient. Those that are asked for, each once: ids in order,
    # numbered without counting them, for which a GPU would have to be waited for.
    in_order, order = ids.flatten().sort()
    number = torch.zeros_like(in_order)
    number[1:] = (in_order[1:] != in_order[:-1]).cumsum(0)
    asked_for = torch.zeros_like(in_order).scatter_(0, number, in_order)
    wide = torch.promote_types(gy.dtype, torch.float32)
    flat = gy.reshape(-1, gy.shape[-1]).to(wide)
    gradient = torch.zeros_like(flat).index_add_(0, number, flat[order])
    delta = a[:, asked_for].t() @ scaled_b(a, b, e, scale).t()
    return (delta * gradient).abs().sum(dtype=torch.float64)


def embedding_sketch(
    sketch: Sketch, gy: Tensor, ids: Tensor, padding_idx: int | None, scale_grad_by_freq: bool
) -> None:
    """Adds the gradient of the weight to a sketch, as ``torch.nn.functional.embedding`` counts it."""
    ids, gy = ids.flatten(), gy.reshape(-1, gy.shape[-1])
    if scale_grad_by_freq:
        counts = torch.zeros_like(sketch.omega[0]).index_add_(0, ids, sketch.omega.new_ones(len(ids)))
        gy = gy / counts[ids, None]
    if padding_idx is not None:
        gy = gy.masked_fill((ids == padding_idx)[:, None], 0.0)
    sketch.add_lookup(gy, ids)


def convolution(x: Tensor, a: Tensor, b: Tensor, e: Tensor, scale: float, geometry: Geometry) -> Tensor:
    """``s B (E * (A x))`` with the convolution A, of the given geometry, and B, of kernel size 1."""
    convolve, (kernel, mix) = CONVOLUTIONS[len(geometry.kernel_size)], _kernels(x, a, b, e, scale, geometry)
    return convolve(convolve(x, kernel, None, *geometry[1:]), mix)


def convolution_gradients(
    gy: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    e: Tensor,
    scale: float,
    geometry: Geometry,
    *,
    needs_x: bool,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """Gradients of x (None unless ``needs_x``), A, B and E for that of the update."""
    dims = len(geometry.kernel_size)
    shape, (x, gy) = x.shape, _batched(dims, x, gy)
    kernel, mix = _kernels(x, a, b, e, scale, geometry)
    t = CONVOLUTIONS[dims](x, kernel, None, *geometry[1:])
    gt = _INPUT_GRADIENTS[dims](t.shape, mix, gy)
    gp = _WEIGHT_GRADIENTS[dims](t, mix.shape, gy).view_as(b).to(b.dtype)
    ga = _WEIGHT_GRADIENTS[dims](x, kernel.shape, gt, *geometry[1:]).view_as(a).to(a.dtype)
    gx = _INPUT_GRADIENTS[dims](x.shape, kernel, gt, *geometry[1:]).view(shape) if needs_x else None
    return gx, ga, *_through_scaled_b(gp, a, b, e, scale)


def convolution_importance(
    geometry: Geometry, gy: Tensor, scale: float, x: Tensor, a: Tensor, b: Tensor, e: Tensor
) -> Tensor:
    """The importance that one backward pass adds, float64."""
    delta = scaled_b(a, b, e, scale) @ a
    return (delta * convolution_weight_gradient(geometry, gy, x)).abs().sum(dtype=torch.float64)


def convolution_weight_gradient(geometry: Geometry, gy: Tensor, x: Tensor) -> Tensor:
    """The gradient of the weight, as the matrix (out, in)."""
    dims = len(geometry.kernel_size)
    x, gy = _batched(dims, x, gy)
    shape = (gy.shape[1], x.shape[1], *geometry.kernel_size)
    gradient: Tensor = _WEIGHT_GRADIENTS[dims](x, shape, gy, *geometry[1:])
    return gradient.flatten(1)


def _kernels(
    x: Tensor, a: Tensor, b: Tensor, e: Tensor, scale: float, geometry: Geometry
) -> tuple[Tensor, Tensor]:
    """A and P as kernels of convolutions."""
    dims = len(geometry.kernel_size)
    kernel = a.to(x.dtype).view(-1, x.shape[-dims - 1], *geometry.kernel_size)
    return kernel, scaled_b(a, b, e, scale).to(x.dtype).view(*b.shape, *[1] * dims)


def _batched(dims: int, x: Tensor, gy: Tensor) -> tuple[Tensor, Tensor]:
    gy = gy.to(x.dtype) if gy.dtype != x.dtype else gy
    return (x.unsqueeze(0), gy.unsqueeze(0)) if x.dim() == dims + 1 else (x, gy)
