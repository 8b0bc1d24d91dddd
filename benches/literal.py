"""IncreLoRA as the paper writes it, in plain PyTorch: the dense update at every forward pass, its dense
gradient kept at every backward pass, scores smoothed module by module, orthogonality in the loss.

What increlora_rs is compared with; it shares no code with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

_RESERVE_E = 1e-5
_STD = 0.02


class LiteralLinear(nn.Module):
    """``base(x) + dropout(x) @ dW.T`` with ``dW = alpha / rank * B diag(E) A`` as a whole.

    Args:
        base: The frozen layer.
        rank: Active components.
        reserve: Components in reserve, which count with a fixed E.
        alpha: The scale's numerator.
        dropout: Probability with which an element of x is dropped.
        dtype: Of A, B and E.
    """

    def __init__(
        self,
        base: nn.Linear,
        *,
        rank: int,
        reserve: int = 1,
        alpha: float = 16.0,
        dropout: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        rows = rank + reserve
        self.a = nn.Parameter(torch.randn(rows, base.in_features, dtype=dtype) * _STD)
        self.b = nn.Parameter(torch.randn(base.out_features, rows, dtype=dtype) * _STD)
        self.e = nn.Parameter(torch.zeros(rank, 1, dtype=dtype))
        self.alpha = alpha
        self.dropout = nn.Dropout(dropout) if dropout > 0.0 else nn.Identity()
        self.delta: Tensor | None = None

    @property
    def rank(self) -> int:
        """Number of active components."""
        return int(self.e.shape[0])

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        reserve = self.a.shape[0] - self.rank
        e = torch.cat([self.e, self.e.new_full((reserve, 1), _RESERVE_E)])
        delta = self.b @ (self.a * e) * (self.alpha / self.rank)
        if delta.requires_grad:
            delta.retain_grad()
            self.delta = delta
        update: Tensor = self.dropout(x) @ delta.to(x.dtype).T
        return self.base(x) + update

    def importance(self) -> float:
        """``sum |dW * dLoss/d(dW)| / sqrt(out in)`` of the last backward pass."""
        delta = self.delta
        if delta is None or delta.grad is None:
            return 0.0
        return (delta * delta.grad).abs().sum().item() / math.sqrt(delta.numel())


def adapt(model: nn.Module, targets: Iterable[str], **options: object) -> nn.Module:
    """Freezes ``model`` and puts a :class:`LiteralLinear` in place of each linear layer whose name ends
    as one of ``targets``."""
    model.requires_grad_(False)
    endings = tuple(f".{target}" for target in targets)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and f".{name}".endswith(endings):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, LiteralLinear(layer, **options))  # type: ignore[arg-type]
    return model


def literal_layers(model: nn.Module) -> list[LiteralLinear]:
    """The adapted layers, in model order."""
    return [layer for layer in model.modules() if isinstance(layer, LiteralLinear)]


def orthogonality(layers: Iterable[LiteralLinear]) -> Tensor:
    """Mean over all A and B of ``||A A^T - I||_F`` and ``||B^T B - I||_F``: a term of the loss."""
    norms = []
    for layer in layers:
        for gram in (layer.a @ layer.a.T, layer.b.T @ layer.b):
            norms.append(
                torch.linalg.norm(gram - torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device))
            )
    return torch.stack(norms).mean()


class LiteralScheduler:
    """Smooths the importances at every step and grows ranks at every ``interval``-th.

    Args:
        layers: The adapted layers.
        optimizer: Holds their parameters.
        interval: Steps between growth events.
        top_h: Layers that gain a component at each.
        beta1, beta2: Decays of the smoothing.
    """

    def __init__(
        self,
        layers: list[LiteralLinear],
        optimizer: torch.optim.Optimizer,
        *,
        interval: int,
        top_h: int,
        beta1: float = 0.85,
        beta2: float = 0.85,
    ) -> None:
        self.layers = layers
        self.optimizer = optimizer
        self.interval, self.top_h = interval, top_h
        self.betas = beta1, beta2
        self.mean = [0.0] * len(layers)
        self.uncertainty = [0.0] * len(layers)
        self.steps = 0

    @property
    def scores(self) -> list[float]:
        """S_k of every layer."""
        return [mean * unsure for mean, unsure in zip(self.mean, self.uncertainty, strict=True)]

    def before_step(self) -> None:
        """After the backward pass: takes the importances in."""
        beta1, beta2 = self.betas
        self.steps += 1
        for k, layer in enumerate(self.layers):
            value = layer.importance()
            self.mean[k] = beta1 * self.mean[k] + (1 - beta1) * value
            self.uncertainty[k] = beta2 * self.uncertainty[k] + (1 - beta2) * abs(value - self.mean[k])

    def after_step(self) -> None:
        """After the optimizer: grows if it is time."""
        if self.steps % self.interval:
            return
        order = sorted(range(len(self.layers)), key=lambda k: -self.scores[k])
        for k in order[: self.top_h]:
            layer = self.layers[k]
            a = torch.randn_like(layer.a[:1]) * _STD
            b = torch.randn_like(layer.b[:, :1]) * _STD
            self._append(layer.a, a, 0)
            self._append(layer.b, b, 1)
            self._append(layer.e, torch.full_like(layer.e[:1], _RESERVE_E), 0)

    def _append(self, parameter: nn.Parameter, rows: Tensor, dim: int) -> None:
        with torch.no_grad():
            parameter.set_(torch.cat([parameter, rows], dim))  # type: ignore[call-overload]
        parameter.grad = None
        state = self.optimizer.state.get(parameter, {})
        for name, value in state.items():
            if torch.is_tensor(value) and value.dim():
                state[name] = torch.cat([value, torch.zeros_like(rows)], dim)
