"""What comparisons of tiny models are made of: a tokenizer of ten words, rows of a task."""

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = ["good", "bad", "film", "a", "the", "was", "very", "plot", "song", "book"]


def save_tokenizer(folder, pad):
    special = ["[UNK]", "[END]", *(["[PAD]"] if pad else [])]
    vocabulary = {word: number for number, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        eos_token="[END]",
        pad_token="[PAD]" if pad else None,
        model_max_length=32,
    )
    fast.save_pretrained(folder)


def lines(count, score=False):
    rng = np.random.default_rng(5)
    rows = []
    for k in range(count):
        words = " ".join(rng.choice(WORDS, 3 + k % 4))
        label = f"{(k % 6) * 0.5:.2f}" if score else str(k % 2)
        rows.append(f"{words} {'good' if k % 2 else 'bad'}\t\t{label}")
    return "text_a\ttext_b\tlabel\n" + "\n".join(rows) + "\n"
