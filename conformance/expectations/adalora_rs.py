"""What is expected of AdaLoRA: LoRA's factors with a number of E between them, 0 at the start, and more
components than ``r``."""

from __future__ import annotations

from .shared import CLASS_NAMES, MIXED_DORA, NO_SUM, NOT_GATHERED, TRAINED_E, Expectations

_SLOW = "E starts at 0 and is in the gradients of A and B: a few steps move less than the test asks for"
_EMBEDDED = r"Embedding \+ transformers Conv1D"

EXPECTATIONS = Expectations(
    refusals=(NO_SUM,),
    excluded=(
        (
            r"test_lora_conversion\[.*GPTJ",
            "asks that a LoRA of rank 8 be near an adapter that begins with 12 random components",
        ),
    ),
    failures=(
        ("", r"TestLayerRepr::test_repr_lora_", CLASS_NAMES),
        ("", TRAINED_E, "lists LoRA's parameters; E is trained beside them"),
        (
            "",
            r"test_inject_from_state_dict_missing_keys_warning",
            "takes A and B of a module out of what is saved, and E still names it",
        ),
        ("", r"test_save_pretrained_warns_for_unsharded_state_dict", NOT_GATHERED),
        MIXED_DORA,
        ("", rf"test_only_params_are_updated\[{_EMBEDDED} ([123] LoRA-|1 LoRA trainable_tokens-)", _SLOW),
        ("", rf"test_only_params_are_updated\[{_EMBEDDED} 2 DoRA-", _SLOW),
        ("", rf"test_disable_adapters(_with_merging)?\[{_EMBEDDED} 2 LoRA-", _SLOW),
        ("", rf"test_disable_adapters_with_merging\[{_EMBEDDED} 2 DoRA-", _SLOW),
        ("", r"test_causal_lm_training_trainer_compile\[lora\]", _SLOW),
        ("", r"TestMultiRankAdapter::test_multirank_2", "asks for rank `r`; a module begins with `init_r`"),
        (
            "",
            r"test_(inject_from_state_dict_model_with_weight_conversion|prefix_removal_is_undone)",
            "knows a fresh adapter by B, which is random; E is 0",
        ),
    ),
)
