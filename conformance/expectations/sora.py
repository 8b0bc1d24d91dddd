"""What is expected of SoRA: LoRA's factors with gates between them."""

from __future__ import annotations

from .shared import CLASS_NAMES, NO_SUM, NOT_GATHERED, TRAINED_E, Expectations

EXPECTATIONS = Expectations(
    refusals=(NO_SUM,),
    failures=(
        ("", r"TestLayerRepr::test_repr_lora_", CLASS_NAMES),
        ("", TRAINED_E, "lists LoRA's parameters; the gates are trained beside them"),
        (
            "",
            r"test_inject_from_state_dict_missing_keys_warning",
            "takes A and B of a module out of what is saved, and the gates still name it",
        ),
        ("", r"test_save_pretrained_warns_for_unsharded_state_dict", NOT_GATHERED),
    ),
)
