"""Which of PEFT's tests are not run, which must fail, which skips are right, and why: a file a method."""

from . import adalora_rs, increlora, lora_mini, lorta, melora, mora, prilora, sora
from .shared import Expectations

_BY_NAME = {
    "adalora_rs": adalora_rs.EXPECTATIONS,
    "increlora": increlora.EXPECTATIONS,
    "lora_mini": lora_mini.EXPECTATIONS,
    "lorta": lorta.EXPECTATIONS,
    "melora": melora.EXPECTATIONS,
    "mora": mora.EXPECTATIONS,
    "prilora": prilora.EXPECTATIONS,
    "sora": sora.EXPECTATIONS,
}


def expected_of(method: str) -> Expectations:
    """What is expected of the method of that name; without a file, what is expected of all."""
    return _BY_NAME.get(method, Expectations())
