"""A method: its configuration, how it builds updates, and what it changes while they are trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peft.utils.peft_types import PeftType

from ..support.peft_type import member
from .structure import Structure


@dataclass(frozen=True)
class Method:
    """One method; its configuration's ``method`` is set to it.

    Args:
        name: Its name: in capitals PEFT's type, and the row in every table.
        title: Its name as the paper writes it.
        config: The class of its configurations.
        structure: How the update of a module is built.
        policy: What changes between backward pass and optimizer; None: nothing.
        summary: What an adapter of it is, in a sentence that goes on with its ranks: the model card's.
        paper: Address of the paper.

    Raises:
        ValueError: PEFT would not find the structure's parameters.
    """

    name: str
    title: str
    config: Any
    structure: Structure
    policy: Any = None
    summary: str = "A LoRA"
    paper: str = ""

    def __post_init__(self) -> None:
        names = self.structure.names
        if "lora_A" not in names or not all(name.startswith("lora_") for name in names):
            raise ValueError(
                f"{self.name}: the parameters are named {names}, but PEFT and transformers know an adapter's "
                "by 'lora_', and that a layer has one by 'lora_A'; take names that begin so, 'lora_A' among "
                "them."
            )
        self.config.method = self

    @property
    def peft_type(self) -> PeftType:
        """PEFT's type."""
        return member(self.name)
