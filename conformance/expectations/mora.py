"""What is expected of MoRA: one square matrix, on linear layers."""

from __future__ import annotations

from .shared import CLASS_NAMES, LAST_BITS, NO_SUM, NOT_GATHERED, TRAINED_E, Expectations

EXPECTATIONS = Expectations(
    refusals=(
        (r"it is of kind '(\w+)'", "an {} as a target module raises by name"),
        NO_SUM,
    ),
    excluded=(
        (r"test_mixed_adapter_batches_mlp\[LoRA mixed adapter-", LAST_BITS),
        (r"test_save_load_roundtrip_fsdp_wrapped\[Vanilla MLP 6 LoRA-", LAST_BITS),
    ),
    failures=(
        ("", r"TestLayerRepr::test_repr_lora_(linear|conv1d)$", CLASS_NAMES),
        ("", TRAINED_E, "lists LoRA's parameters; there is one matrix and no B"),
        (
            "",
            r"test_inject_from_state_dict_(missing_keys_warning|model_with_weight_conversion)"
            r"|test_prefix_removal_is_undone",
            "looks at B; there is one matrix",
        ),
        ("", r"TestMultiRankAdapter::test_multirank", "takes the side of the matrix for the rank"),
        (
            "",
            r"test_lora_conversion\[MoraConfig-config_kwargs0-.*(GPT2LMHeadModel|qwen2)\]",
            "asks that a LoRA of rank 8 be near an update of more",
        ),
        ("", r"test_save_pretrained_warns_for_unsharded_state_dict", NOT_GATHERED),
    ),
)
