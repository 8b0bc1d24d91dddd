"""A low-rank update of a convolution as a differentiable operation, ``s B (E * (A drop(x)))`` with the
convolution A, like the base layer, and B, of kernel size 1: by torch's operations, eager and in a graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn import grad as of

from ..gauges import Gauge
from ..gauges.sensitivity import of_gradient
from .autocast import without_autocast
from .graph import ASKED, SCALE, TAKEN, empty_total, gradients_of_asked, keep, kept, opened, split, value
from .observed import observed
from .probe import for_graph
from .scaled import scaled_b, through_scaled_b
from .untouched import Show
from .update import Call, LowRank

_CONVOLUTIONS: dict[int, Any] = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_WEIGHT_GRADIENTS: dict[int, Any] = {1: of.conv1d_weight, 2: of.conv2d_weight, 3: of.conv3d_weight}
_INPUT_GRADIENTS: dict[int, Any] = {1: of.conv1d_input, 2: of.conv2d_input, 3: of.conv3d_input}

_FACTORS = f"Tensor a, Tensor b, Tensor e, {SCALE}"
_GEOMETRY = "SymInt[] kernel_size, SymInt[] stride, SymInt[] padding, SymInt[] dilation"


class Geometry(NamedTuple):
    """Where the kernel of a convolution goes, a number a dimension."""

    kernel_size: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]


def convolution(x: Tensor, update: LowRank, call: Call, *, base: Any) -> Tensor:
    """What the update adds to a convolution.

    Args:
        x: Input of ``base``, (N, C, ...) or (C, ...).
        update: The factors, A (rows, C times kernel size).
        call: Its dropout, probe and slot.
        base: An ``nn.Conv1d``, ``Conv2d`` or ``Conv3d`` of one group.

    Returns:
        Tensor of the shape of the output of ``base`` and the dtype of x, under autocast of autocast's.
    """
    a, b, e, probe = update.a, update.b, update.e, call.probe
    seen = None
    if call.dropout > 0.0:
        if probe is not None and probe.gauge is not None and not probe.gauge.fused:
            # The gradient is of the weight itself, which has no dropout before it.
            seen = _geometry_of(base, x)[1]
        x = functional.dropout(x, call.dropout)
    geometry, x = _geometry_of(base, x)
    if torch.compiler.is_compiling():
        asked = for_graph(probe, call.slot)
        in_graph: Tensor = torch.ops.increlora.convolution_forward(
            x, seen, a, b, e, *split(update.scale), *geometry, *asked
        )
        return in_graph
    scale = float(update.scale)

    def show(gauge: Gauge, slot: int, gy: Tensor, x: Tensor, a: Tensor, b: Tensor, e: Tensor) -> None:
        _show(gauge, slot, gy, x, a, b, e, scale, geometry)

    result = _forward(x, a, b, e, scale, geometry)
    return observed(result, show, probe, call.slot, x if seen is None else seen, a, b, e)


def show_gradient_of(base: Any) -> Show:
    """What has the gauge add the gradient of the weight of ``base``, for an update without components."""

    def show(gauge: Gauge, slot: int, gy: Tensor, x: Tensor) -> None:
        geometry, x = _geometry_of(base, x)
        gauge.add_gradient(slot, _weight_gradient(geometry, gy, x))

    return show


def _geometry_of(base: Any, x: Tensor) -> tuple[Geometry, Tensor]:
    """That of a convolution module, and its input: padded where it does not pad with zeros on both sides
    alike."""
    padding = base.padding
    if base.padding_mode != "zeros" or isinstance(padding, str):
        mode = "constant" if base.padding_mode == "zeros" else base.padding_mode
        x = functional.pad(x, base._reversed_padding_repeated_twice, mode=mode)
        padding = (0,) * len(base.kernel_size)
    return Geometry(base.kernel_size, base.stride, padding, base.dilation), x


def _shape_of_output(x: Tensor, out: int, geometry: Geometry) -> tuple[int, ...]:
    dims = len(geometry.kernel_size)
    sizes = (
        (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        for size, kernel, stride, padding, dilation in zip(x.shape[-dims:], *geometry, strict=True)
    )
    return *x.shape[: -dims - 1], out, *sizes


def _forward(x: Tensor, a: Tensor, b: Tensor, e: Tensor, scale: float, geometry: Geometry) -> Tensor:
    convolve, (kernel, mix) = _CONVOLUTIONS[len(geometry.kernel_size)], _kernels(x, a, b, e, scale, geometry)
    if not len(a):
        # In a graph that knows no rank; torch has no convolution without channels.
        return x.new_zeros(_shape_of_output(x, len(b), geometry))
    return convolve(convolve(x, kernel, None, *geometry[1:]), mix)


def _backward(
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
    if not len(a):
        gx = torch.zeros_like(x) if needs_x else None
        return gx, torch.zeros_like(a), torch.zeros_like(b), torch.zeros_like(e)
    dims = len(geometry.kernel_size)
    shape, (x, gy) = x.shape, _batched(dims, x, gy)
    kernel, mix = _kernels(x, a, b, e, scale, geometry)
    t = _CONVOLUTIONS[dims](x, kernel, None, *geometry[1:])
    gt = _INPUT_GRADIENTS[dims](t.shape, mix, gy)
    gp = _WEIGHT_GRADIENTS[dims](t, mix.shape, gy).view_as(b).to(b.dtype)
    ga = _WEIGHT_GRADIENTS[dims](x, kernel.shape, gt, *geometry[1:]).view_as(a).to(a.dtype)
    gx = _INPUT_GRADIENTS[dims](x.shape, kernel, gt, *geometry[1:]).view(shape) if needs_x else None
    return gx, ga, *through_scaled_b(gp, a, b, e, scale)


def _show(
    gauge: Gauge,
    slot: int,
    gy: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    e: Tensor,
    scale: float,
    geometry: Geometry,
) -> None:
    """Has the gauge add one backward pass."""
    gradient = _weight_gradient(geometry, gy, x)
    if gauge.fused:
        gauge.total[slot] += of_gradient(gradient, a, scaled_b(a, b, e, scale))
    else:
        gauge.add_gradient(slot, gradient)


def _weight_gradient(geometry: Geometry, gy: Tensor, x: Tensor) -> Tensor:
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


@torch.library.custom_op(
    "increlora::convolution_forward",
    mutates_args=(),
    schema=f"(Tensor x, Tensor? seen, {_FACTORS}, {_GEOMETRY}, {ASKED}) -> Tensor",
)
def _forward_in_graph(  # type: ignore[no-untyped-def]
    x, seen, a, b, e, factor, scale, kernel_size, stride, padding, dilation, *asked
):
    geometry = Geometry(kernel_size, stride, padding, dilation)
    with without_autocast(x.device.type):
        return _forward(x, a, b, e, scale * value(factor, 1.0), geometry)


@_forward_in_graph.register_fake
def _(  # type: ignore[no-untyped-def]
    x, seen, a, b, e, factor, scale, kernel_size, stride, padding, dilation, *asked
):
    dims = len(kernel_size)
    weight = x.new_empty((b.shape[0], x.shape[-dims - 1], *kernel_size))
    return _CONVOLUTIONS[dims](x, weight, None, stride, padding, dilation)


@torch.library.custom_op(
    "increlora::convolution_backward",
    mutates_args=(),
    schema=f"(Tensor gy, Tensor x, Tensor? seen, {_FACTORS}, {_GEOMETRY}, bool needs_x, {TAKEN})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward_in_graph(  # type: ignore[no-untyped-def]
    gy, x, seen, a, b, e, factor, scale, kernel_size, stride, padding, dilation, needs_x, *taken
):
    update = a, b, e, scale * value(factor, 1.0), Geometry(kernel_size, stride, padding, dilation)
    total, gauge = opened(a, (b.shape[0], a.shape[1]), *taken)
    with without_autocast(x.device.type):
        gx, *gradients = _backward(gy, x, *update, needs_x=needs_x)
        if gauge is not None:
            _show(gauge, 0, gy, x if seen is None else seen, *update)
    return x.new_empty(0) if gx is None else gx, *gradients, total


@_backward_in_graph.register_fake
def _(  # type: ignore[no-untyped-def]
    gy,
    x,
    seen,
    a,
    b,
    e,
    factor,
    scale,
    kernel_size,
    stride,
    padding,
    dilation,
    needs_x,
    armed,
    given,
    gauge,
):
    gx = x.new_empty(x.shape if needs_x else 0)
    total = empty_total(a, (b.shape[0], a.shape[1]), given, gauge)
    return gx, *(factor.new_empty(factor.shape) for factor in (a, b, e)), total


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, seen, a, b, e, factor, ctx.scale, *rest = inputs
    *ctx.geometry, collector, armed, given, gauge = rest
    keep(ctx, (x, seen, a, b, e, factor), (collector, armed, given, gauge))


def _gradients(ctx: Any, gy: Tensor) -> tuple[Any, ...]:
    (tensors, taken), needs_x = kept(ctx), ctx.needs_input_grad[0]
    gx, *gradients, total = torch.ops.increlora.convolution_backward(
        gy, *tensors, ctx.scale, *ctx.geometry, needs_x, *taken
    )
    rest = [None] * (2 + len(ctx.geometry))
    return gx if needs_x else None, None, *gradients, *rest, *gradients_of_asked(ctx, total)


_forward_in_graph.register_autograd(_gradients, setup_context=_save)
