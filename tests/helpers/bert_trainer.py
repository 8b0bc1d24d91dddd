"""The tiny BERT that workers have a Trainer train, and the arguments that they give it."""

import torch
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

# Nothing is drawn in a step, and the values are large enough for methods to tell modules apart.
WITHOUT_DROPOUT = {"initializer_range": 0.2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def classifier(**changes):
    """The model, the same at each call."""
    torch.manual_seed(7)
    sizes = {
        "vocab_size": 99,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "num_labels": 3,
    }
    return BertForSequenceClassification(BertConfig(**sizes | changes))


def arguments(out, steps, stop, **others):
    """Those of a training of so many steps that saves a checkpoint at ``stop``."""
    settings = {
        "output_dir": str(out),
        "max_steps": steps,
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-3,
        "save_steps": stop,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "ddp_backend": "gloo",
    }
    return TrainingArguments(**settings | others)
