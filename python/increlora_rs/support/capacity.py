"""How much an adapter can hold, beside what its data hold: where it is far more, ranks cannot matter much.

A LoRA that learns random strings by heart stores about 2 bits for each number that it trains: 1.7 to 2.75 by
measurement on small decoders (arXiv 2607.21351), and 2 is the rule of thumb of Schulman et al., LoRA Without
Regret, 2025, who reckon with 1 bit a token of text.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import arguments

BITS_PER_PARAMETER = 2.0
BITS_PER_TOKEN = 1.0
# Rows that are looked at, evenly spread, to tell what all hold.
_ROWS = 1000
_LABELS, _TOKENS = ("labels", "label", "label_ids"), "input_ids"
# What the loss leaves out.
_IGNORED = -100


@dataclass(frozen=True)
class Data:
    """What data hold.

    Args:
        bits: In all.
        told: Of what, in words: "3,668 labels".
    """

    bits: float
    told: str


@dataclass(frozen=True)
class Capacity:
    """What an adapter can hold.

    Args:
        parameters: Numbers that it trains.
        data: What its data hold; None: not known.
    """

    parameters: int
    data: Data | None = None

    @property
    def bits(self) -> float:
        """What it can hold, about."""
        return BITS_PER_PARAMETER * self.parameters

    def __str__(self) -> str:
        own = f"{self.parameters:,} trained parameters can hold some {_amount(self.bits)}"
        if self.data is None:
            return own
        data, ratio = self.data, self.bits / max(self.data.bits, 1.0)
        return f"{own}, {data.told} some {_amount(data.bits)} ({_times(ratio)}): {_advice(ratio)}"


def data_of(dataset: Any) -> Data | None:
    """What a data set holds that can be learned: the entropy of its labels, or a bit a token where it has
    labels by token, or none but ``input_ids``.

    Args:
        dataset: Rows that are mappings, by number, with a length; of another, as one that is a stream,
            nothing is known. A number: what the data hold, in bits.

    Returns:
        Told from a thousand rows, evenly spread; None where that cannot be.

    Raises:
        TypeError, ValueError: a number that is none of bits.
    """
    if isinstance(dataset, (int, float)):
        arguments.number("data", dataset, above=0.0)
        return Data(float(dataset), "the data")
    if not isinstance(dataset, Sized) or not hasattr(dataset, "__getitem__") or len(dataset) == 0:
        return None
    count = len(dataset)
    places = np.unique(np.linspace(0, count - 1, min(count, _ROWS)).astype(int)).tolist()
    rows = [dataset[place] for place in places]
    if not all(isinstance(row, Mapping) for row in rows):
        return None
    name = next((name for name in (*_LABELS, _TOKENS) if all(name in row for row in rows)), None)
    if name is None:
        return None
    values = [np.asarray(row[name]) for row in rows]
    if any(value.dtype.kind not in "biuf" for value in values):
        return None
    share = count / len(rows)
    if name != _TOKENS and all(value.size == 1 for value in values):
        return labels(Counter(value.item() for value in values), count)
    tokens = sum(int((value != _IGNORED).sum()) for value in values)
    return tokens_of(round(share * tokens))


def labels(counts: Mapping[Any, int], rows: int | None = None) -> Data:
    """What labels hold: their entropy.

    Args:
        counts: How often each value is there, perhaps among some of the rows.
        rows: Of all; None: those counted.
    """
    total = sum(counts.values())
    entropy = -sum(n / total * math.log2(n / total) for n in counts.values())
    rows = total if rows is None else rows
    return Data(entropy * rows, f"{rows:,} labels")


def tokens_of(tokens: int) -> Data:
    """What so many tokens hold."""
    return Data(BITS_PER_TOKEN * tokens, f"{tokens:,} tokens")


def _amount(bits: float) -> str:
    for unit, size in (("Gbit", 1e9), ("Mbit", 1e6), ("kbit", 1e3)):
        if bits >= size:
            return f"{bits / size:.3g} {unit}"
    return f"{bits:.0f} bit"


def _times(ratio: float) -> str:
    return f"{ratio:.2g} times less" if ratio >= 1.0 else f"{1.0 / ratio:.2g} times more"


def _advice(ratio: float) -> str:
    if ratio >= _PLENTY:
        return "rank is plentiful, so where it sits can hardly matter, and a lower r may do as well"
    if ratio >= 1.0:
        return "rank is not short; where it sits may matter a little"
    return "rank is short, so where it sits can matter"


# By so much the adapters of the six tasks of docs/evidence.md, on which no choice of ranks beat another,
# can hold more than their data at least.
_PLENTY = 5.0
