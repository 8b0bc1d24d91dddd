"""Words for the tests that train on text: sentences of our own, and a tokenizer for them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

_ANIMALS = ("cat", "dog", "owl", "fox")
_DOINGS = ("sleeps", "eats", "runs", "sings")
_SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def sentences() -> list[str]:
    """Lines that a model can learn something from."""
    return [
        f"the {first} {doing} and the {second} waits"
        for first, doing, second in itertools.product(_ANIMALS, _DOINGS, _ANIMALS)
    ]


def save_quotes(folder: Path) -> None:
    """Writes the sentences as a data set with the columns that PEFT's tests know."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "train.jsonl", "w", encoding="utf-8") as lines:
        for sentence in sentences():
            lines.write(json.dumps({"quote": sentence, "author": "", "tags": []}) + "\n")


def save_tokenizer(folder: Path) -> None:
    """Writes a tokenizer of whole words."""
    tokenizer = Tokenizer(models.WordLevel(unk_token=_SPECIAL["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(sentences(), trainers.WordLevelTrainer(special_tokens=[*_SPECIAL.values()]))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=128, **_SPECIAL
    ).save_pretrained(folder)
