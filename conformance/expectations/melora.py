"""What is expected of MELoRA: two stacks of factors, on linear layers that its slices divide."""

from __future__ import annotations

from .shared import CLASS_NAMES, LAST_BITS, NO_SUM, NOT_GATHERED, Expectations

EXPECTATIONS = Expectations(
    refusals=(
        (r"(n_slices)=\d+ does not divide its", "a module that `{}` does not divide raises by name"),
        (r"it is of kind '(\w+)'", "an {} as a target module raises by name"),
        NO_SUM,
    ),
    excluded=((r"test_mixed_adapter_batches_partly_overlapping_target_layers", LAST_BITS),),
    failures=(
        ("", r"TestLayerRepr::test_repr_lora_linear$", CLASS_NAMES),
        ("", r"test_save_pretrained_warns_for_unsharded_state_dict", NOT_GATHERED),
        ("", r"TestMultiRankAdapter::test_multirank", "takes the slices of A, its first size, for the rank"),
        (
            "",
            r"test_lora_conversion\[MeLoraConfig-config_kwargs0-.*OPT",
            "asks that a LoRA of rank 8 be near an update of more",
        ),
    ),
)
