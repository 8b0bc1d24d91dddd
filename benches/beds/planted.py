"""The planted bed: a teacher is MiniLM's first blocks with an update of low rank in a few modules.

The student, without the updates, learns the teacher's last hidden states on news. The figure is the squared
error on documents that were held out, over that of the untrained student.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from increlora_rs.support.seeded import generator
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

from .bed import Bed, Figure
from .losses import mean_loss
from .modules import linear_sizes, weight_of
from .sources import held_out, minilm, news
from .store import stored
from .tokens import windows

FIGURE = Figure("held-out loss over the untrained student's", higher_is_better=False)
_TEST_BATCHES = 8


@dataclass(frozen=True)
class Options:
    """The planted bed's sizes.

    Args:
        blocks: Blocks of MiniLM that are kept.
        ranks: Of the updates, one for each planted module.
        decay: Each singular value of an update over the one before.
        norm: Frobenius norm of an update over that of the weight.
        steps, batch, tokens: Of the training.
    """

    blocks: int = 3
    ranks: tuple[int, ...] = field(default=(12, 12, 12), metadata={"option": "--planted-ranks"})
    decay: float = 1.0
    norm: float = 0.25
    steps: int = 300
    batch: int = 8
    tokens: int = 32


class Planted(Bed):
    """The bed with one seed, which draws the modules, their updates and the batches.

    Args:
        options: The sizes.
        seed: Of the teacher and the batches.
        cache: A folder that keeps the teacher's outputs; None: memory alone.
    """

    def __init__(self, options: Options, seed: int, cache: Path | None = None) -> None:
        self.steps = options.steps
        self._options = options
        self.sizes = linear_sizes(self.model())
        lots = generator(seed, "planted")
        chosen = draw_modules(list(self.sizes), len(options.ranks), lots)
        teacher = self.model()
        values = plant(teacher, chosen, options, lots)
        self.planted = frozenset(chosen)
        learn, test = _news_tokens()
        shape = (options.batch, options.tokens)
        batches = [windows(learn, *shape, generator(seed, "batch", i)) for i in range(options.steps)]
        tests = [windows(test, 2 * shape[0], shape[1], generator(0, "test", i)) for i in range(_TEST_BATCHES)]
        outputs = stored(cache, "planted", (options, seed), lambda: _outputs(teacher, batches))
        self._train = list(zip(batches, outputs, strict=True))
        self._test = list(zip(tests, _outputs(teacher, tests), strict=True))
        self.untrained = self._error(self.model())
        self.spectra = self._worth(teacher, values)

    def model(self) -> nn.Module:
        """The student."""
        return _blocks(self._options.blocks)

    def loss(self, model: nn.Module, step: int) -> Tensor:
        """Mean squared error of the last hidden states."""
        return _error(model, *self._train[step])

    def observe(self, model: nn.Module) -> None:
        """A pass over the held-out text."""
        self._error(model)

    def score(self, model: nn.Module, parameters: int) -> float:
        """Held-out error over the untrained student's."""
        return self._error(model) / self.untrained

    def _error(self, model: nn.Module) -> float:
        model.eval()
        with torch.no_grad():
            return mean_loss([_error(model, *pair) for pair in self._test])

    def _worth(self, teacher: nn.Module, values: dict[str, list[float]]) -> dict[str, list[float]]:
        """What each component is worth: the error of a student that lacks this module's update alone, shared
        among the components by their squares."""
        original, worth = self.model(), {}
        for name, singular in values.items():
            weight = weight_of(teacher, name)
            kept = weight.detach().clone()
            with torch.no_grad():
                weight.copy_(weight_of(original, name))
                error = self._error(teacher)
                weight.copy_(kept)
            energy = sum(value**2 for value in singular)
            worth[name] = [error * value**2 / energy for value in singular]
        return worth


def draw_modules(names: Sequence[str], count: int, lots: torch.Generator) -> list[str]:
    """So many different modules by lot.

    Raises:
        ValueError: there are fewer.
    """
    if count > len(names):
        raise ValueError(
            f"--planted-ranks: {count} ranks for {len(names)} modules; give fewer, or more --blocks."
        )
    return [names[i] for i in torch.randperm(len(names), generator=lots)[:count].tolist()]


def plant(
    model: nn.Module, chosen: Sequence[str], options: Options, lots: torch.Generator
) -> dict[str, list[float]]:
    """Adds a random update to each chosen module's weight; gives the updates' singular values by module."""
    values = {}
    for name, rank in zip(chosen, options.ranks, strict=True):
        weight = weight_of(model, name)
        left, right = (torch.linalg.qr(torch.randn(n, rank, generator=lots))[0] for n in weight.shape)
        spectrum = options.decay ** torch.arange(rank, dtype=torch.float32)
        spectrum *= options.norm * weight.detach().norm() / spectrum.norm()
        with torch.no_grad():
            weight += (left * spectrum) @ right.T
        values[name] = spectrum.tolist()
    return values


def _error(model: nn.Module, ids: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(model(input_ids=ids).last_hidden_state, target)


def _outputs(teacher: nn.Module, batches: list[Tensor]) -> list[Tensor]:
    teacher.eval()
    with torch.no_grad():
        return [teacher(input_ids=ids).last_hidden_state for ids in batches]


@cache
def _news_tokens() -> tuple[Tensor, Tensor]:
    """The news in MiniLM's tokens: those to train on, those to measure on."""
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    learn, test = (
        torch.tensor(
            [token for row in tokenizer(texts, add_special_tokens=False)["input_ids"] for token in row]
        )
        for texts in held_out(news())
    )
    return learn, test


def _blocks(count: int) -> nn.Module:
    return deepcopy(_minilm(count))


@cache
def _minilm(count: int) -> nn.Module:
    model = AutoModel.from_pretrained(
        minilm(),
        add_pooling_layer=False,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        dtype=torch.float32,
    )
    if not 1 <= count <= len(model.encoder.layer):
        raise ValueError(f"--blocks {count}: MiniLM has 1 to {len(model.encoder.layer)}.")
    model.encoder.layer = model.encoder.layer[:count]
    model.config.num_hidden_layers = count
    return model.requires_grad_(False)
