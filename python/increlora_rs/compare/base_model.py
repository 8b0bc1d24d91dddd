"""The model that is adapted: a directory, or a GGUF file, of an encoder or a decoder."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    set_seed,
)

from .tasks import Task

# hidden_dropout_prob, attention_dropout, classifier_dropout, resid_pdrop, dropout, dropout_rate ...
_DROPOUT = re.compile(r"dropout|pdrop$")
# Newer releases of Transformers keep a GGUF file's weights packed, or say so of dense ones, unless told;
# older ones have no such choice.
_GGUF = getattr(transformers, "GgufConfig", None)
_READ_BY = {".json", ".safetensors", ".bin", ".txt", ".model", ".gguf"}


class BaseModel:
    """Makes the same classifier anew for each run.

    Args:
        path: Directory of a Transformers model with its tokenizer, or a GGUF file.

    Raises:
        FileNotFoundError: there is nothing at ``path``.
    """

    def __init__(self, path: Path) -> None:
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"--model {path} does not exist; give a model's directory or GGUF file.")
        self._folder = path if path.is_dir() else path.parent
        self._options: dict[str, Any] = {} if path.is_dir() else {"gguf_file": path.name}
        self._dense: dict[str, Any] = {}
        if self._options and _GGUF is not None:
            self._dense = {"quantization_config": _GGUF(dequantize=True)}
        self.digest = _digest(sorted(path.iterdir()) if path.is_dir() else [path])
        self.tokenizer = AutoTokenizer.from_pretrained(self._folder, **self._options)
        if self.tokenizer.pad_token is None:
            # Decoders come without; the attention mask and the classifier pass over it.
            self.tokenizer.pad_token = self.tokenizer.eos_token or self.tokenizer.unk_token

    def classifier(self, task: Task, seed: int, dropout: float | None = None) -> PreTrainedModel:
        """The model with a new classifier, or regressor, whose first weights ``seed`` determines.

        Args:
            dropout: In place of all the probabilities of dropout that the model's configuration has.
        """
        config = AutoConfig.from_pretrained(self._folder, **self._options)
        if dropout is not None:
            for name, value in config.to_dict().items():
                if _DROPOUT.search(name) and type(value) in (int, float):
                    setattr(config, name, dropout)
        config.num_labels = max(1, len(task.labels))
        config.problem_type = "regression" if task.is_regression else "single_label_classification"
        set_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(
            self._folder,
            config=config,
            dtype="float32",
            # On the CPU torch's fused attention takes as long backward, in bfloat16, as all the rest.
            attn_implementation=None if torch.cuda.is_available() else "eager",
            # A classifier that comes with the model is for another task.
            ignore_mismatched_sizes=True,
            **self._options,
            **self._dense,
        )
        model.config.pad_token_id = self.tokenizer.pad_token_id
        return model


def _digest(files: list[Path]) -> str:
    whole = hashlib.sha256()
    for file in files:
        if file.suffix in _READ_BY and file.is_file():
            with open(file, "rb") as content:
                while part := content.read(1 << 20):
                    whole.update(part)
    return whole.hexdigest()
