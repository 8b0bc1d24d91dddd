"""The methods that are compared: each makes an adapted layer, or adapts the model of the step."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from increlora_rs import AdaLoraRsConfig, IncreLoraConfig
from peft import AdaLoraConfig, LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertModel
from transformers.utils import ModelOutput

from . import literal
from .sizes import Size

FROZEN, LORA, ADALORA, LITERAL, OURS = "frozen", "PEFT LoRA", "PEFT AdaLoRA", "literal", "increlora_rs"
METHODS = (FROZEN, LORA, ADALORA, LITERAL, OURS)
# Only the whole step differs from that of OURS.
OUR_ADALORA = "increlora_rs AdaLoRA"
ALPHA = 16

# Steps between growth events, in the step and for AdaLoRA's reallocation alike.
INTERVAL = 100
# Of 18 modules; the paper grows 2 to 12 of 72.
TOP_H = 2
_TOTAL_STEPS = 10_000

TARGETS = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")


@dataclass(frozen=True)
class Precision:
    """Dtypes of the base model with its activations, and of the adapter's parameters."""

    base: torch.dtype
    adapter: torch.dtype


PRECISIONS = {
    "float32": Precision(torch.float32, torch.float32),
    # What get_peft_model does with a bfloat16 model unless told otherwise.
    "bfloat16": Precision(torch.bfloat16, torch.float32),
    "bfloat16 throughout": Precision(torch.bfloat16, torch.bfloat16),
}


def adapt(
    model: nn.Module,
    method: str,
    targets: Sequence[str],
    *,
    precision: Precision,
    rank: int,
    dropout: float,
    growing: bool = False,
) -> nn.Module:
    """``model``, of ``precision.base``, adapted by ``method``.

    Args:
        growing: Ours in the paper's form, with room for ranks to grow; else at a fixed rank.
    """
    if method == FROZEN:
        return model.requires_grad_(False)
    if method == LITERAL:
        return literal.adapt(
            model,
            targets,
            rank=rank,
            reserve=1 if growing else 0,
            alpha=float(ALPHA),
            dropout=dropout,
            dtype=precision.adapter,
        )
    config = _config(method, rank=rank, dropout=dropout, targets=list(targets), growing=growing)
    widen = precision.adapter == torch.float32
    with warnings.catch_warnings():
        # AdaLoraConfig, about an `r` that it does not use.
        warnings.simplefilter("ignore")
        return get_peft_model(model, config, autocast_adapter_dtype=widen)


def _config(method: str, *, rank: int, dropout: float, targets: list[str], growing: bool) -> PeftConfig:
    common: dict[str, Any] = {"lora_alpha": ALPHA, "lora_dropout": dropout, "target_modules": targets}
    # Of both AdaLoRAs: PEFT's defaults, but for the interval.
    pruning: dict[str, Any] = {
        "init_r": rank,
        "tinit": 0,
        "tfinal": 0,
        "deltaT": INTERVAL,
        "orth_reg_weight": 0.5,
    }
    if method == LORA:
        return LoraConfig(r=rank, **common)
    if method == ADALORA:
        # `rank` rows as the others have; AdaLoRA masks rows, so its step costs the same at any budget.
        return AdaLoraConfig(target_r=max(1, rank // 2), total_step=_TOTAL_STEPS, **pruning, **common)
    if method == OUR_ADALORA:
        return AdaLoraRsConfig(r=max(1, rank // 2), **pruning, **common)
    if growing:
        # Never below the others' rank: it starts there and grows by one more component on average.
        return IncreLoraConfig.paper(
            r=rank + 1,
            init_r=rank,
            importance_window="auto",
            tinit=INTERVAL - 1,
            deltaT=INTERVAL,
            top_h=TOP_H,
            **common,
        )
    return IncreLoraConfig(r=rank, **common)


class Projections(nn.Module):
    """Linear layers that share one input: one, or the three of an attention."""

    def __init__(self, features: int, out: int, count: int = 1) -> None:
        super().__init__()
        self.projections = nn.ModuleList(nn.Linear(features, out) for _ in range(count))


def adapted_layers(
    method: str,
    shape: tuple[int, int],
    *,
    precision: Precision,
    rank: int,
    dropout: float,
    device: str,
    count: int = 1,
) -> list[nn.Module]:
    """``count`` adapted layers of ``shape`` (in, out), training."""
    torch.manual_seed(0)
    with torch.device(device):
        host = Projections(*shape, count).to(precision.base)
    targets = [f"projections.{k}" for k in range(count)]
    adapt(host, method, targets, precision=precision, rank=rank, dropout=dropout)
    return list(host.to(device).train().projections)


@dataclass
class Output(ModelOutput):
    """The loss where AdaLoRA looks for it, to add its regulariser."""

    loss: Tensor | None = None


class Regression(nn.Module):
    """A BERT encoder from a configuration, random weights, whose loss is the mean square of its last
    hidden state's distance from a target."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        config = BertConfig(
            vocab_size=32,
            hidden_size=size.width,
            num_hidden_layers=size.layers,
            num_attention_heads=max(1, size.width // 64),
            intermediate_size=4 * size.width,
            max_position_embeddings=size.tokens,
            # Only the adapters' dropout is compared.
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.bert = BertModel(config, add_pooling_layer=False)

    def forward(self, embeddings: Tensor, target: Tensor) -> Output:
        """The loss of a batch."""
        hidden = self.bert(inputs_embeds=embeddings).last_hidden_state
        return Output(loss=(hidden.float() - target).pow(2).mean())


def training_model(
    method: str, size: Size, *, precision: Precision, dropout: float, growing: bool = False
) -> nn.Module:
    """The model of the training step, adapted in all six linear layers of each block."""
    torch.manual_seed(0)
    with torch.device(size.device):
        model = Regression(size).to(precision.base)
    adapted = adapt(
        model, method, TARGETS, precision=precision, rank=size.rank, dropout=dropout, growing=growing
    )
    return adapted.to(size.device).train()


def batch(
    size: Size, precision: Precision, *, count: int | None = None, tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """Embeddings that want their gradient, so that it flows through every layer, and a target."""
    generator = torch.Generator().manual_seed(1)
    shape = (count or size.batch, tokens or size.tokens, size.width)
    embeddings = torch.randn(shape, generator=generator).to(size.device, precision.base)
    return embeddings.requires_grad_(), torch.randn(shape, generator=generator).to(size.device)
