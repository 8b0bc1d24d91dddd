"""What is expected under any method: refusals, tests that are not run, skips of PEFT's own; and the record in
which a method says the rest."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

#: Refusals of ours that a test may run into; the reason names what was refused.
_REFUSALS = (
    (r"^(\w+)=.* is not supported by \w+Config", "`{}` raises by name"),
    (r"^init_lora_weights='(\w+)' is unknown", '`init_lora_weights="{}"` raises by name'),
    (r"a module of type (\w+) is not supported", "`{}` as a target module raises by name"),
    (r"the convolution has (groups)=\d+", "a convolution with `{}` raises by name"),
    (r"is not compatible with the `(PeftMixedModel)`", "`{}` raises by name"),
)

OLD_PEFT = "transformers' `add_adapter` asks for a newer PEFT, whatever the method"

#: Tests that are not run.
_EXCLUDED = (
    (r"test_inject_from_state_dict_stable_diffusion", "needs a diffusion pipeline from the hub"),
    (r"test_inject_from_state_dict_transformers(_irregular_targets)?$", OLD_PEFT),
    (r"test_inject_from_state_dict_compiled_model", OLD_PEFT),
    (
        r"test_causal_lm_training_lora_bnb_compile",
        "bitsandbytes' 4-bit layer fails in a compiled graph on the CPU, under `LoraConfig` too",
    ),
)

#: Skips of PEFT's own: its words, and ours.
_SKIPS = (
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
    (r"^LoRA with multiple adapters with target_param", "PEFT has one adapter with `target_parameters`"),
    (r"^Merging with target_parameters", "PEFT merges twice without `target_parameters`"),
    (r"^Skipping FSDP \+ target_paramters", "PEFT shards no model with `target_parameters`"),
)

# What several methods have in common.
NO_SUM = (
    r"a weighted sum of (\w+(?:-\w+)?) adapters is in general none",
    "`add_weighted_adapter` raises by name: a sum of adapters is in general none of {}",
)
SUM_OF_FACTORS = (
    r"combination_type='(linear|ties|dare_ties|dare_linear|magnitude_prune)' adds the factors",
    '`add_weighted_adapter(combination_type="{}")` raises by name: components that grew apart do not '
    "correspond",
)
SUM_OF_MODULES = (
    r"adapters: '\w+' has (modules_to_save|trainable_token_indices)=",
    "`add_weighted_adapter` of adapters with `{}` raises by name",
)
ONE_KIND = (
    r"it is of kind '(embedding|convolution)', and \S+ adapts linear modules only",
    "`{}` as the kind of a target module raises by name",
)
TRAINED_E = (
    r"TestRequiresGrad::test_requires_grad_(modules_to_save_(default|disabling|multiple_adapters)"
    r"|follows_inference_mode_(modules_to_save|trainable_token_indices)"
    r"|lora_(different_targets|same_targets|conv2d|emb_conv1d))$"
)
LAST_BITS = "asks for nearly equal bits of logarithms near 0, of logits that are large: rounding decides"
CLASS_NAMES = "asks for the class names of PEFT's LoRA layers"
MIXED_DORA = (
    "",
    r"test_mixed_adapter_batches_lora_with_dora_raises",
    "asks for an error; a batch may mix adapters that have magnitudes",
)
NOT_GATHERED = "asks for a warning where parts of a parameter are saved; that raises by name"


@dataclass(frozen=True)
class Expectations:
    """What a method adds to what is expected of all.

    Args:
        states: In which the tests run: "fresh", adapters as they are made, and "grown" where ranks grow.
        refusals: Of errors by their words, with the reason; ``{}`` is what the pattern's group found.
        excluded: Tests, by a pattern of their pytest id, that are not run, with the reason.
        failures: State ("" for every one), test and reason of those that must fail.
    """

    states: tuple[str, ...] = ("fresh",)
    refusals: tuple[tuple[str, str], ...] = ()
    excluded: tuple[tuple[str, str], ...] = ()
    failures: tuple[tuple[str, str, str], ...] = ()

    def refusal(self, error: BaseException) -> str | None:
        """The reason if ``error``, or what led to it, is a refusal of ours by name; else None."""
        for cause in _chain(error):
            for pattern, reason in (*_REFUSALS, *self.refusals):
                if isinstance(cause, ValueError) and (found := re.search(pattern, str(cause))):
                    return reason.format(*found.groups())
        return None

    def left_out(self, test: str) -> str | None:
        """Why ``test``, a pytest id, is not run; None if it is."""
        return _reason(test, (*_EXCLUDED, *self.excluded))

    def failure(self, test: str, state: str) -> str | None:
        """Why ``test`` must fail in ``state``; None if it must pass."""
        return _reason(test, ((pattern, why) for when, pattern, why in self.failures if when in ("", state)))

    def skip(self, words: str) -> str | None:
        """Our reason for a skip with the given words; None if there is no such skip."""
        return _reason(words, _SKIPS)


def _reason(text: str, reasons: Iterable[tuple[str, str]]) -> str | None:
    return next((reason for pattern, reason in reasons if re.search(pattern, text)), None)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
