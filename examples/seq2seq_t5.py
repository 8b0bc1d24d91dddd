"""Seq2SeqTrainer with growing ranks: an encoder-decoder learns to say a sentence's first half.

python examples/seq2seq_t5.py --out adapter
"""

import argparse
from pathlib import Path

import increlora_rs
import tiny
from peft import TaskType, get_peft_model
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    set_seed,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="directory of a model; default: a small random one")
    parser.add_argument("--out", type=Path, default=Path("adapter"))
    parser.add_argument("--rank", type=int, default=3, help="average rank at the end")
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    set_seed(0)
    if options.model is None:
        model, tokenizer = tiny.t5(), tiny.tokenizer()
    else:
        model = AutoModelForSeq2SeqLM.from_pretrained(options.model)
        tokenizer = AutoTokenizer.from_pretrained(options.model)
    config = increlora_rs.IncreLoraConfig(
        task_type=TaskType.SEQ_2_SEQ_LM, r=options.rank, lora_alpha=16, target_modules=["q", "v"]
    )
    model = get_peft_model(model, config)

    examples = []
    for sentence in tiny.sentences():
        row = tokenizer(sentence, return_token_type_ids=False)
        row["labels"] = [*tokenizer(sentence.split(" and ")[0])["input_ids"], tokenizer.eos_token_id]
        examples.append(row)
    growth = increlora_rs.IncreLoraCallback()
    trainer = Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(
            output_dir=str(options.out / "checkpoints"),
            max_steps=options.steps,
            per_device_train_batch_size=8,
            learning_rate=5e-3,
            predict_with_generate=True,
            generation_max_length=6,
            save_strategy="no",
            report_to="none",
            logging_steps=20,
        ),
        train_dataset=examples,
        eval_dataset=examples[:8],
        data_collator=DataCollatorForSeq2Seq(tokenizer, model),
        callbacks=[growth],
    )
    trainer.train()
    print(trainer.evaluate())
    model.save_pretrained(options.out)
    print(f"parameters {growth.scheduler.spent} of {growth.scheduler.budget}")


if __name__ == "__main__":
    main()
