"""The text bed: a frozen decoder learns Python's own library, which is unlike what it was trained on.

The figure is the held-out loss in nats a token, on files that were held out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from increlora_rs.support.seeded import generator
from torch import Tensor, nn

from . import smollm2
from .bed import Bed, Figure
from .decoder import Size, encoded, frozen_decoder, trained_weights
from .losses import mean_loss
from .modules import linear_sizes
from .sources import held_out, standard_library
from .tokens import windows

FIGURE = Figure("held-out loss", higher_is_better=False)
_TEST_BATCHES = 16
SMALL, SMOLLM2 = "small", "smollm2"


@dataclass(frozen=True)
class Options:
    """The text bed's sizes.

    Args:
        base: The decoder: small (trained on news, on one core some minutes) or SmolLM2-135M.
        steps, batch, length: Of the training; windows of a step and tokens of a window.
        layers: Of the small decoder.
        pretraining: Steps of its own training.
    """

    base: str = field(default=SMALL, metadata={"choices": (SMALL, SMOLLM2)})
    steps: int = 600
    batch: int = 8
    length: int = 128
    layers: int = 2
    pretraining: int = 1500


class Text(Bed):
    """The bed with one seed, which draws the batches.

    Args:
        options: The sizes.
        seed: Of the batches.
        cache: A folder that keeps the small decoder; None: memory alone.
    """

    def __init__(self, options: Options, seed: int, cache: Path | None = None) -> None:
        self.steps = options.steps
        self._options = options
        self._seed = seed
        self._size = Size(layers=options.layers, steps=options.pretraining)
        learn, test = held_out(standard_library())
        if options.base == SMALL:
            self._weights = trained_weights(self._size, cache)
            self._learn, tests = (encoded(texts, self._size.vocabulary) for texts in (learn, test))
        else:
            self._learn, tests = (smollm2.encoded(texts) for texts in (learn, test))
        self._test = [
            windows(tests, options.batch, options.length, generator(0, "test", i))
            for i in range(_TEST_BATCHES)
        ]
        self.sizes = linear_sizes(self.model())

    def model(self) -> nn.Module:
        """The decoder."""
        if self._options.base == SMALL:
            return frozen_decoder(self._size, self._weights)
        return smollm2.model()

    def loss(self, model: nn.Module, step: int) -> Tensor:
        """Mean cross entropy of the next token."""
        lots = generator(self._seed, "batch", step)
        return _loss(model, windows(self._learn, self._options.batch, self._options.length, lots))

    def observe(self, model: nn.Module) -> None:
        """A pass over the held-out text."""
        self.score(model, 0)

    def score(self, model: nn.Module, parameters: int) -> float:
        """Mean cross entropy on held-out text, whatever the parameters."""
        with torch.no_grad():
            return mean_loss([_loss(model, ids) for ids in self._test])


def _loss(model: nn.Module, ids: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=ids, labels=ids).loss
    return loss
