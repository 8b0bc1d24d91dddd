"""The exact sign-flip test of paired differences: could they as well have the other sign, each by itself?"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product


def p_value(differences: Sequence[float]) -> float:
    """Two-sided: the share of all 2^n choices of signs whose sum is as far from 0 as the one found, or
    farther."""
    found = abs(sum(differences)) * (1.0 - 1e-12)
    sums = [
        abs(sum(sign * difference for sign, difference in zip(signs, differences, strict=True)))
        for signs in product((1.0, -1.0), repeat=len(differences))
    ]
    return sum(value >= found for value in sums) / len(sums)
