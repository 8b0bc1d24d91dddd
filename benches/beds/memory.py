"""The memory bed: a small decoder, trained on news and frozen, learns random strings by heart.

A string is a key of a few tokens and then tokens drawn evenly from the vocabulary. What is stored of it is
tokens log2(vocabulary) - CE, CE the cross entropy of those tokens in bits; the figure is the sum over strings
for each trained parameter. An adapter stores some 2 bits a parameter, so 1.5 times that is offered.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from increlora_rs.support.seeded import generator
from torch import Tensor, nn
from torch.nn import functional as F

from .bed import Bed, Figure
from .decoder import Size, frozen_decoder, trained_weights
from .modules import linear_sizes

FIGURE = Figure("stored bits a trained parameter", higher_is_better=True)
_MOST_AT_ONCE = 64


@dataclass(frozen=True)
class Options:
    """The memory bed's sizes. The data are the same at all budgets.

    Args:
        strings: Strings to learn; 44 of 704 bits are 1.5 times 2 bits for each of rank 2's 10,240 parameters.
        tokens, key: Of a string, after its key, and of the key.
        steps, batch: Of the training; strings of a step.
        layers: Of the decoder.
        pretraining: Steps of the decoder's own training.
    """

    strings: int = 44
    tokens: int = 64
    key: int = 4
    steps: int = 4000
    batch: int = 4
    layers: int = 2
    pretraining: int = 1500


class Memory(Bed):
    """The bed with one seed, which draws the strings and their order.

    Args:
        options: The sizes.
        seed: Of the strings.
        cache: A folder that keeps the decoder; None: memory alone.
    """

    def __init__(self, options: Options, seed: int, cache: Path | None = None) -> None:
        self.steps = options.steps
        self._options = options
        self._size = Size(layers=options.layers, steps=options.pretraining)
        self._weights = trained_weights(self._size, cache)
        self.sizes = linear_sizes(self.model())
        self.strings = draw_strings(options, self._size.vocabulary, seed)
        self._order = _orders(options, seed)

    def model(self) -> nn.Module:
        """The decoder."""
        return frozen_decoder(self._size, self._weights)

    def loss(self, model: nn.Module, step: int) -> Tensor:
        """Mean cross entropy of the tokens after the key."""
        return self._entropy(model, self.strings[self._order[step]]).mean()

    def observe(self, model: nn.Module) -> None:
        """A pass over the strings."""
        self._entropies(model)

    def score(self, model: nn.Module, parameters: int) -> float:
        """Stored bits for each trained parameter."""
        return stored_bits(self._entropies(model), self._size.vocabulary) / parameters

    def _entropies(self, model: nn.Module) -> Tensor:
        with torch.no_grad():
            return torch.cat([self._entropy(model, part) for part in self.strings.split(_MOST_AT_ONCE)])

    def _entropy(self, model: nn.Module, strings: Tensor) -> Tensor:
        """Cross entropy of each token after the key, in nats, (strings, tokens)."""
        key = self._options.key
        logits = model(input_ids=strings).logits[:, key - 1 : -1]
        return F.cross_entropy(logits.transpose(1, 2), strings[:, key:], reduction="none")


def stored_bits(entropy: Tensor, vocabulary: int) -> float:
    """Bits that are stored of strings drawn evenly: what they hold, less what is still missing.

    Args:
        entropy: Cross entropy of each token in nats.
    """
    return entropy.numel() * math.log2(vocabulary) - float(entropy.double().sum()) / math.log(2.0)


def draw_strings(options: Options, vocabulary: int, seed: int) -> Tensor:
    """The strings with their keys, no key twice, (strings, key + tokens)."""
    lots = generator(seed, "strings")
    strings = torch.randint(vocabulary, (options.strings, options.key + options.tokens), generator=lots)
    while len(torch.unique(strings[:, : options.key], dim=0)) < options.strings:
        strings[:, : options.key] = torch.randint(vocabulary, (options.strings, options.key), generator=lots)
    return strings


def _orders(options: Options, seed: int) -> list[Tensor]:
    """The strings of each step: all of them before one comes again."""
    row: list[Tensor] = []
    lots = generator(seed, "order")
    while sum(map(len, row)) < options.steps * options.batch:
        row.append(torch.randperm(options.strings, generator=lots))
    return list(torch.cat(row).split(options.batch))[: options.steps]
