"""A low-rank update of an embedding as a differentiable operation, ``s B (E * A[:, id])`` for each id: by
torch's operations, eager and in a graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..gauges import Gauge
from ..gauges.sensitivity import of_lookup
from .autocast import without_autocast
from .graph import ASKED, SCALE, TAKEN, empty_total, gradients_of_asked, keep, kept, opened, split, value
from .observed import observed
from .probe import for_graph
from .scaled import scaled_b, through_scaled_b
from .untouched import Show
from .update import Call, LowRank

_LOOKUP = f"Tensor ids, Tensor a, Tensor b, Tensor e, {SCALE}, SymInt padding_idx, bool scale_grad_by_freq"
_NO_PADDING = -1


def embedding(
    ids: Tensor,
    update: LowRank,
    call: Call,
    *,
    padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,
) -> Tensor:
    """What the update adds to an embedding.

    Args:
        ids: Integers, any shape.
        update: The factors, A (rows, number of embeddings).
        call: Its probe and slot; nothing is dropped.
        padding_idx, scale_grad_by_freq: As in ``torch.nn.functional.embedding``, for A.

    Returns:
        Tensor (*ids, out) of the dtype of the parameters, under autocast of autocast's.
    """
    a, b, e = update.a, update.b, update.e
    padding = _padding(padding_idx, a.shape[1])
    if torch.compiler.is_compiling():
        asked = for_graph(call.probe, call.slot)
        in_graph: Tensor = torch.ops.increlora.embedding_forward(
            ids, a, b, e, *split(update.scale), padding, scale_grad_by_freq, *asked
        )
        return in_graph
    scale = float(update.scale)

    def show(gauge: Gauge, slot: int, gy: Tensor, ids: Tensor, a: Tensor, b: Tensor, e: Tensor) -> None:
        _show(gauge, slot, gy, ids, a, b, e, scale, padding, scale_grad_by_freq)

    result = _forward(ids, a, b, e, scale, padding, scale_grad_by_freq)
    return observed(result, show, call.probe, call.slot, ids, a, b, e)


def show_gradient_of(base: Any, factor: Tensor | None) -> Show:
    """What has the gauge add the gradient of the weight of ``base``, for an update without components.

    Args:
        base: An ``nn.Embedding``.
        factor: What an update is multiplied by; None: 1.
    """

    def show(gauge: Gauge, slot: int, gy: Tensor, ids: Tensor) -> None:
        gy = gy if factor is None else gy * factor.to(gy.dtype)
        size, padding = base.num_embeddings, _padding(base.padding_idx, base.num_embeddings)
        _add_lookup(gauge, slot, gy, ids, size, padding, base.scale_grad_by_freq)

    return show


def _padding(padding_idx: int | None, size: int) -> int:
    return _NO_PADDING if padding_idx is None else padding_idx % size


def _forward(
    ids: Tensor, a: Tensor, b: Tensor, e: Tensor, scale: float, padding: int, scale_grad_by_freq: bool
) -> Tensor:
    padding_idx = None if padding == _NO_PADDING else padding
    t = functional.embedding(ids, a.t(), padding_idx=padding_idx, scale_grad_by_freq=scale_grad_by_freq)
    return t @ scaled_b(a, b, e, scale).t()


def _backward(
    gy: Tensor,
    ids: Tensor,
    a: Tensor,
    b: Tensor,
    e: Tensor,
    scale: float,
    padding: int,
    scale_grad_by_freq: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of A, B and E for that of the update."""
    gy, ids = gy.reshape(-1, gy.shape[-1]).to(b.dtype), ids.flatten()
    gt = gy @ scaled_b(a, b, e, scale)
    ga = torch.ops.aten.embedding_dense_backward(gt, ids, a.shape[1], padding, scale_grad_by_freq).t()
    gb, ge = through_scaled_b(gy.t() @ a.t()[ids], a, b, e, scale)
    return ga.contiguous(), gb, ge


def _show(
    gauge: Gauge,
    slot: int,
    gy: Tensor,
    ids: Tensor,
    a: Tensor,
    b: Tensor,
    e: Tensor,
    scale: float,
    padding: int,
    scale_grad_by_freq: bool,
) -> None:
    """Has the gauge add one backward pass; a gauge of the weight's own gradient adds what
    ``torch.nn.functional.embedding`` makes of the padding and of ids that come more than once."""
    if gauge.fused:
        gauge.total[slot] += of_lookup(gy, ids, a, scaled_b(a, b, e, scale))
        return
    _add_lookup(gauge, slot, gy, ids, a.shape[1], padding, scale_grad_by_freq)


def _add_lookup(
    gauge: Gauge, slot: int, gy: Tensor, ids: Tensor, size: int, padding: int, scale_grad_by_freq: bool
) -> None:
    ids, gy = ids.flatten(), gy.reshape(-1, gy.shape[-1])
    if scale_grad_by_freq:
        counts = gauge.total.new_zeros(size).index_add_(0, ids, gauge.total.new_ones(len(ids)))
        gy = gy / counts[ids, None]
    if padding != _NO_PADDING:
        gy = gy.masked_fill((ids == padding)[:, None], 0.0)
    gauge.add_lookup(slot, gy, ids)


@torch.library.custom_op(
    "increlora::embedding_forward", mutates_args=(), schema=f"({_LOOKUP}, {ASKED}) -> Tensor"
)
def _forward_in_graph(  # type: ignore[no-untyped-def]
    ids, a, b, e, factor, scale, padding, scale_grad_by_freq, *asked
):
    with without_autocast(a.device.type):
        return _forward(ids, a, b, e, scale * value(factor, 1.0), padding, scale_grad_by_freq)


@_forward_in_graph.register_fake
def _(ids, a, b, *rest):  # type: ignore[no-untyped-def]
    return b.new_empty((*ids.shape, b.shape[0]))


@torch.library.custom_op(
    "increlora::embedding_backward",
    mutates_args=(),
    schema=f"(Tensor gy, {_LOOKUP}, {TAKEN}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _backward_in_graph(  # type: ignore[no-untyped-def]
    gy, ids, a, b, e, factor, scale, padding, scale_grad_by_freq, *taken
):
    lookup = ids, a, b, e, scale * value(factor, 1.0), padding, scale_grad_by_freq
    total, gauge = opened(a, (b.shape[0], a.shape[1]), *taken)
    with without_autocast(a.device.type):
        gradients = _backward(gy, *lookup)
        if gauge is not None:
            _show(gauge, 0, gy, *lookup)
    return *gradients, total


@_backward_in_graph.register_fake
def _(  # type: ignore[no-untyped-def]
    gy, ids, a, b, e, factor, scale, padding, scale_grad_by_freq, armed, given, gauge
):
    total = empty_total(a, (b.shape[0], a.shape[1]), given, gauge)
    return *(factor.new_empty(factor.shape) for factor in (a, b, e)), total


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ids, a, b, e, factor, ctx.scale, *rest = inputs
    *ctx.lookup, collector, armed, given, gauge = rest
    keep(ctx, (ids, a, b, e, factor), (collector, armed, given, gauge))


def _gradients(ctx: Any, gy: Tensor) -> tuple[Any, ...]:
    tensors, taken = kept(ctx)
    *gradients, total = torch.ops.increlora.embedding_backward(gy, *tensors, ctx.scale, *ctx.lookup, *taken)
    return None, *gradients, None, None, None, None, *gradients_of_asked(ctx, total)


_forward_in_graph.register_autograd(_gradients, setup_context=_save)
