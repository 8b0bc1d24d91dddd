"""The methods, a row each: PEFT's types, the tables, the comparison and the shared tests follow from it."""

from ..contract.method import Method
from . import adalora, increlora, lora_mini, lorta, melora, mora, prilora, sora

METHODS: tuple[Method, ...] = (
    increlora.METHOD,
    adalora.METHOD,
    lora_mini.METHOD,
    lorta.METHOD,
    melora.METHOD,
    mora.METHOD,
    prilora.METHOD,
    sora.METHOD,
)
