"""Short names for the rows of the tables of bad arguments."""

from torch import Tensor


def describe(value: object) -> str:
    """A tensor by its shape, dtype and device, a class by its name."""
    if isinstance(value, Tensor):
        return f"{list(value.shape)} {value.dtype} {value.device}".replace("torch.", "")
    if isinstance(value, list | tuple):
        return ", ".join(describe(entry) for entry in value) or "empty"
    return value.__name__ if isinstance(value, type) else str(value)
