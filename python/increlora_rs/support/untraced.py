"""Functions that torch.compile runs as they are, wherever a user's compiled function calls them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

_F = TypeVar("_F", bound=Callable[..., Any])


def untraced(function: _F) -> _F:
    """``function``, left out of every graph: it changes sizes, warns, or calls what no graph can hold."""
    return cast(_F, torch.compiler.disable(function))
