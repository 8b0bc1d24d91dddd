"""Names of modules: without PEFT's prefix, and as patterns that match one module alone."""

from __future__ import annotations

import functools
import re
from collections import Counter

_PREFIX = "base_model.model."
# In the name of a module, but not in those of its parameters, as torch's checkpoint_wrapper and FSDP1 have
# them saved.
_WRAPPED = re.compile(r"(_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")


def short(name: str) -> str:
    """A module's name without PEFT's prefix."""
    return as_saved(name).removeprefix(_PREFIX)


def as_saved(name: str) -> str:
    """A module's name as it stands in the keys of the model's ``state_dict``."""
    return _WRAPPED.sub("", name)


def rank_pattern(ranks: dict[str, int]) -> dict[str, int]:
    """LoraConfig's ``rank_pattern`` of ranks by module name; anchored, so that no name matches the end
    of another."""
    return dict(zip(anchored(tuple(ranks)), ranks.values(), strict=True))


@functools.lru_cache(maxsize=64)
def anchored(names: tuple[str, ...]) -> tuple[str, ...]:
    """Keys of ``rank_pattern``, regular expressions of which each matches its own name only: the
    anchored name, escaped where a dot in it would match another name."""
    # How many names of each length are matched by a name whose dots stand in certain places.
    matched: dict[tuple[int, tuple[int, ...]], Counter[str]] = {}
    by_length: dict[int, list[str]] = {}
    for name in names:
        by_length.setdefault(len(name), []).append(name)

    def key(name: str) -> str:
        dots = tuple(i for i, letter in enumerate(name) if letter == ".")
        if (len(name), dots) not in matched:
            matched[len(name), dots] = Counter(_dotted(other, dots) for other in by_length[len(name)])
        plain = re.fullmatch(r"[\w.]+", name) and matched[len(name), dots][name] == 1
        return f"^{name if plain else re.escape(name)}"

    return tuple(map(key, names))


def _dotted(name: str, dots: tuple[int, ...]) -> str:
    letters = list(name)
    for i in dots:
        letters[i] = "."
    return "".join(letters)
