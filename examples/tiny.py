"""Small models with random weights, a tokenizer of whole words and sentences of a pattern: what the examples
train where they are given no model."""

import itertools

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

ANIMALS = ("cat", "dog", "owl", "fox")
DOINGS = ("sleeps", "eats", "runs", "sings")
_WIDTH = 32


def sentences() -> list[str]:
    """Lines that a model can learn something from."""
    return [
        f"the {a} {doing} and the {b} waits" for a, doing, b in itertools.product(ANIMALS, DOINGS, ANIMALS)
    ]


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer for :func:`sentences`."""
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.train_from_iterator(sentences(), trainers.WordLevelTrainer(special_tokens=[*special.values()]))
    return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=64, **special)


def bert_classifier(labels: int) -> BertForSequenceClassification:
    """An encoder with a classifier."""
    return BertForSequenceClassification(_bert(num_labels=labels))


def bert() -> BertModel:
    """An encoder."""
    return BertModel(_bert())


def _bert(**options: int) -> BertConfig:
    return BertConfig(
        vocab_size=len(tokenizer()),
        hidden_size=_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=2 * _WIDTH,
        max_position_embeddings=64,
        **options,
    )


def llama() -> LlamaForCausalLM:
    """A decoder."""
    words = tokenizer()
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=2 * _WIDTH,
        max_position_embeddings=64,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    return LlamaForCausalLM(config)


def t5() -> T5ForConditionalGeneration:
    """An encoder-decoder."""
    words = tokenizer()
    config = T5Config(
        vocab_size=len(words),
        d_model=_WIDTH,
        d_kv=8,
        d_ff=2 * _WIDTH,
        num_layers=2,
        num_heads=4,
        pad_token_id=words.pad_token_id,
        eos_token_id=words.eos_token_id,
        decoder_start_token_id=words.pad_token_id,
    )
    return T5ForConditionalGeneration(config)
