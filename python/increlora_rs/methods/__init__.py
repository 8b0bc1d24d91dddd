"""The methods, a row each: PEFT's types, the tables, the comparison and the shared tests follow from it."""

from ..contract.method import Method
from . import increlora

METHODS: tuple[Method, ...] = (increlora.METHOD,)
