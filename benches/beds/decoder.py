"""A small decoder with a tokenizer of its own, trained on news for some minutes and kept in the cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from increlora_rs.support.seeded import generator
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from .sources import held_out, news
from .store import stored
from .tokens import windows

_LR = 3e-3
_WARM_UP = 0.05


@dataclass(frozen=True)
class Size:
    """The decoder's sizes, and those of its training.

    Args:
        layers, width, mlp, heads, vocabulary: Of the model, a Llama with tied embeddings.
        steps, batch, length: Of its training on news.
    """

    layers: int = 2
    width: int = 128
    mlp: int = 384
    heads: int = 4
    vocabulary: int = 2048
    steps: int = 1500
    batch: int = 16
    length: int = 128


@cache
def tokenizer(vocabulary: int) -> Tokenizer:
    """Byte pairs of news; any text can be told in it."""
    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    found.train_from_iterator(held_out(news())[0], trainer)
    return found


def encoded(texts: list[str], vocabulary: int) -> Tensor:
    """The texts in tokens, one behind the other."""
    return torch.tensor([token for row in tokenizer(vocabulary).encode_batch(texts) for token in row.ids])


def new_decoder(size: Size) -> LlamaForCausalLM:
    """The decoder before its training, always the same."""
    state = torch.get_rng_state()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        intermediate_size=size.mlp,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    torch.set_rng_state(state)
    return model


def trained_weights(size: Size, folder: Path | None) -> dict[str, Tensor]:
    """The trained decoder's weights: from ``folder``, where there is one, after the first time."""

    def train() -> dict[str, Tensor]:
        learn, _ = held_out(news())
        model = new_decoder(size)
        _train(model, size, encoded(learn, size.vocabulary))
        return dict(model.state_dict())

    weights: dict[str, Tensor] = stored(folder, "decoder", size, train)
    return weights


def frozen_decoder(size: Size, weights: Mapping[str, Tensor]) -> LlamaForCausalLM:
    """A decoder of given weights."""
    model = new_decoder(size)
    model.load_state_dict(weights)
    return model.requires_grad_(False)


def _train(model: nn.Module, size: Size, tokens: Tensor) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LR, betas=(0.9, 0.95), weight_decay=0.1)
    warm = max(1, round(_WARM_UP * size.steps))
    model.train()
    for step in range(size.steps):
        rate = (step + 1) / warm if step < warm else (size.steps - step) / (size.steps - warm + 1)
        for group in optimizer.param_groups:
            group["lr"] = _LR * rate
        ids = windows(tokens, size.batch, size.length, generator(0, "decoder", step))
        model(input_ids=ids, labels=ids).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
