"""IncreLoRA with ranks that grow, by the gradient unless a test says so, within a budget of components."""

from increlora_rs import IncreLoraConfig


def growing(**settings):
    return IncreLoraConfig(
        **({"importance": "gradient", "budget_unit": "rank", "growth_end": 0.1} | settings)
    )
