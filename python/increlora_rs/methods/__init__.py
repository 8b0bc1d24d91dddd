"""The methods, a row each: PEFT's types, the tables, the comparison and the shared tests follow from it."""

from ..contract.method import Method
from . import increlora, lora_mini, melora, mora, sora

METHODS: tuple[Method, ...] = (
    increlora.METHOD,
    lora_mini.METHOD,
    sora.METHOD,
    melora.METHOD,
    mora.METHOD,
)
