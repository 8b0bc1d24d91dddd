"""Which of PEFT's tests are not run, which must fail, which skips are right, and why."""

from __future__ import annotations

import re
from collections.abc import Iterator

#: Refusals of ours that a test may run into; the reason names what was refused.
_REFUSALS = (
    (r"^(\w+)=.* is not supported by IncreLoraConfig", "`{}` raises by name"),
    (r"^init_lora_weights='(\w+)' is unknown", '`init_lora_weights="{}"` raises by name'),
    (r"a module of type (\w+) is not supported", "`{}` as a target module raises by name"),
    (r"the convolution has (groups)=\d+", "a convolution with `{}` raises by name"),
    (r"'INCRELORA' is not compatible with the `(PeftMixedModel)`", "`{}` raises by name"),
    (
        r"combination_type='(linear|ties|dare_ties|dare_linear|magnitude_prune)' adds the factors",
        '`add_weighted_adapter(combination_type="{}")` raises by name: components that grew apart do not '
        "correspond",
    ),
    (
        r"adapters: '\w+' has (modules_to_save|trainable_token_indices)=",
        "`add_weighted_adapter` of adapters with `{}` raises by name",
    ),
    (r"(rank) \d+ is more than \d+, the smaller of in_features", "a {} above min(in, out) raises by name"),
)

_OLD_PEFT = "transformers' `add_adapter` asks for a newer PEFT, whatever the method"

#: Tests that are not run.
_EXCLUDED: tuple[tuple[str, str], ...] = (
    (r"test_inject_from_state_dict_stable_diffusion", "needs a diffusion pipeline from the hub"),
    (r"test_inject_from_state_dict_transformers(_irregular_targets)?$", _OLD_PEFT),
    (r"test_inject_from_state_dict_compiled_model", _OLD_PEFT),
    (
        r"test_causal_lm_training_lora_bnb_compile",
        "bitsandbytes' 4-bit layer fails in a compiled graph on the CPU, under `LoraConfig` too",
    ),
    (
        r"test_mixed_adapter_batches_mlp\[LoRA mixed adapter-",
        "asks for equal bits where a product of another size rounds otherwise",
    ),
    (
        r"test_add_weighted_adapter_with_different_scaling\[dare_\w+_svd",
        "asks for a correlation that adapters of rank 1, thinned out at random, reach by chance",
    ),
)

_SVD = "the sum of two adapters has a higher rank than each, which is what `svd` keeps"
_E = "lists LoRA's parameters; E is trained beside them"
_METHOD = "asks for the class names of PEFT's LoRA layers"

#: Tests that must fail: state ("" for both), test, reason.
_EXPECTED_FAILURES: tuple[tuple[str, str, str], ...] = (
    ("", r"TestLayerRepr::test_repr_lora_", _METHOD),
    (
        "",
        r"TestRequiresGrad::test_requires_grad_(modules_to_save_(default|disabling|multiple_adapters)"
        r"|follows_inference_mode_(modules_to_save|trainable_token_indices)"
        r"|lora_(different_targets|same_targets|conv2d|emb_conv1d))$",
        _E,
    ),
    (
        "",
        r"test_inject_from_state_dict_missing_keys_warning",
        "takes A and B of a module out of what is saved, and E still names it",
    ),
    (
        "",
        r"test_save_pretrained_warns_for_unsharded_state_dict",
        "asks for a warning where parts of a parameter are saved; that raises by name",
    ),
    (
        "",
        r"test_only_params_are_updated\[Embedding \+ transformers Conv1D 2 LoRA-",
        "three steps move few components by less than the test asks for",
    ),
    (
        "",
        r"test_add_weighted_adapter_with_different_scaling\[svd-[\d.]+-[\d.]+-weights[034]\]",
        _SVD,
    ),
    (
        "fresh",
        r"test_add_weighted_adapter_with_different_scaling\[magnitude_prune_svd-[\d.]+-[\d.]+-weights[034]\]",
        _SVD,
    ),
)

#: Skips of PEFT's own: its words, and ours.
_SKIPS: tuple[tuple[str, str], ...] = (
    (r"^(This test does not apply to|Test not applicable for) ", "for other methods"),
    (r"^(Skip tests that are not|This test is only for) prompt learning", "for other methods"),
    (r"^Testing bias warnings only for LoraConfig", "PEFT runs it for no method"),
    (r"^Merging conv layers with groups>1", "PEFT merges no convolution with `groups`"),
    (r"^Trainable token(s| indices) (is|are|isn)", "PEFT has no such case for `trainable_token_indices`"),
    (r"^Merging two adapters with trainable tokens", "PEFT merges no two adapters with the same tokens"),
    (r"^Multiple active adapters with modules_to_save", "PEFT allows one active adapter with such modules"),
    (r"layers have no bias term$", "the architecture's layers have no bias"),
    (r"for Deberta models$", "PEFT leaves DeBERTa out"),
    (r"^Test does not work with model ", "PEFT leaves the architecture out"),
    (r"^Combining Gemma adapters with SVD", "PEFT leaves the architecture out"),
    (r"^test requires a hardware accelerator", "needs a GPU"),
)


def refusal(error: BaseException) -> str | None:
    """The reason if ``error``, or what led to it, is a refusal of ours by name; else None."""
    for cause in _chain(error):
        for pattern, reason in _REFUSALS:
            if isinstance(cause, ValueError) and (found := re.search(pattern, str(cause))):
                return reason.format(found[1])
    return None


def excluded(test: str) -> str | None:
    """Why ``test``, a pytest id, is not run; None if it is."""
    return next((reason for pattern, reason in _EXCLUDED if re.search(pattern, test)), None)


def expected_failure(test: str, state: str) -> str | None:
    """Why ``test`` must fail in ``state``, "fresh" or "grown"; None if it must pass."""
    for when, pattern, reason in _EXPECTED_FAILURES:
        if when in ("", state) and re.search(pattern, test):
            return reason
    return None


def skip(words: str) -> str | None:
    """Our reason for a skip with the given words; None if there is no such skip."""
    return next((reason for pattern, reason in _SKIPS if re.search(pattern, words)), None)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
