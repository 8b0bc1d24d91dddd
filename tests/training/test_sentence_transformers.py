"""An embedding model of sentence-transformers: its trainer changes ranks, and its vectors survive saving."""

import numpy as np
import pytest
import tiny
import torch
from growing import growing
from increlora_rs import IncreLoraCallback, IncreLoraConfig, export_lora
from increlora_rs.layers.found import adapted_layers
from peft import PeftModel, get_peft_model

sentences = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
losses = pytest.importorskip("sentence_transformers.losses")
datasets = pytest.importorskip("datasets", reason="datasets is not installed, which the trainer needs")

pytestmark = pytest.mark.slow
LINES = tiny.sentences()


@pytest.fixture
def encoder(tmp_path):
    """``encoder()``: a small model of sentence-transformers, the same at each call."""
    torch.manual_seed(0)
    tiny.bert().save_pretrained(tmp_path / "bert")
    tiny.tokenizer().save_pretrained(tmp_path / "bert")

    # Of a plain encoder it takes the mean of the tokens.
    return lambda: sentences.SentenceTransformer(str(tmp_path / "bert"), device="cpu")


def vectors(model):
    return model.encode(LINES[:8])


@pytest.mark.parametrize("form", [growing, IncreLoraConfig], ids=["grows", "moves"])
def test_vectors_are_the_same_loaded_exported_and_merged(form, encoder, tmp_path):
    model, growth = encoder(), IncreLoraCallback()
    config = form(task_type="FEATURE_EXTRACTION", r=3, lora_alpha=6, target_modules=["query", "value"])
    # The layers are put into the very model that `model` holds.
    adapted = get_peft_model(model[0].auto_model, config)
    first, second = LINES[:32], LINES[32:]
    scores = [len({*a.split()} & {*b.split()}) / 8 for a, b in zip(first, second, strict=True)]
    trainer = sentences.SentenceTransformerTrainer(
        model=model,
        args=sentences.SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path / "checkpoints"),
            max_steps=30,
            per_device_train_batch_size=8,
            learning_rate=1e-2,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=datasets.Dataset.from_dict({"sentence1": first, "sentence2": second, "score": scores}),
        loss=losses.CosineSimilarityLoss(model),
        callbacks=[growth],
    )
    trainer.train()
    assert any(rank != (1 if form is growing else 3) for rank in growth.scheduler.ranks.values())
    wanted = vectors(model)
    assert np.abs(wanted - vectors(encoder())).max() > 1e-2

    adapted.save_pretrained(tmp_path / "adapter")
    export_lora(tmp_path / "adapter", tmp_path / "lora")
    for path in ("adapter", "lora"):
        loaded = encoder()
        PeftModel.from_pretrained(loaded[0].auto_model, tmp_path / path)
        np.testing.assert_allclose(vectors(loaded), wanted, atol=1e-5)

    adapted.merge_and_unload()
    assert not adapted_layers(model, "default")
    model.save(str(tmp_path / "merged"))
    merged = sentences.SentenceTransformer(str(tmp_path / "merged"), device="cpu")
    np.testing.assert_allclose(vectors(merged), wanted, atol=1e-5)
