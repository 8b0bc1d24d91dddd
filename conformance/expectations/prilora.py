"""What is expected of PRILoRA: LoRA's factors, on linear layers alone."""

from __future__ import annotations

from .shared import (
    CLASS_NAMES,
    MIXED_DORA,
    NOT_GATHERED,
    ONE_KIND,
    SUM_OF_FACTORS,
    SUM_OF_MODULES,
    Expectations,
)

EXPECTATIONS = Expectations(
    refusals=(ONE_KIND, SUM_OF_FACTORS, SUM_OF_MODULES),
    failures=(
        ("", r"TestLayerRepr::test_repr_lora_(linear|conv1d)$", CLASS_NAMES),
        ("", r"test_save_pretrained_warns_for_unsharded_state_dict", NOT_GATHERED),
        ("", r"TestMultiRankAdapter::test_multirank_2$", "asks for one rank; ranks rise with depth"),
        MIXED_DORA,
    ),
)
