"""transformers' Trainer in lowtide's memory, with evaluation; `patch` is the one new line.

    python examples/hf_trainer.py --model path/to/model --data my-data.jsonl --output my-adapter

The data is JSON lines with `prompt` and `completion`; completions are learnt.
"""

import argparse
from typing import Any

import datasets
import peft
import torch
import transformers

from lowtide.integrations.hf import patch


def encoded(row: dict[str, str], tokenizer: Any, max_length: int) -> dict[str, list[int]]:
    """Ids of prompt and completion, and labels that leave the prompt out."""
    prompt = tokenizer(row["prompt"] + "\n")["input_ids"]
    completion = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
    ids = [*prompt, *completion, tokenizer.eos_token_id][:max_length]
    return {"input_ids": ids, "labels": [-100] * min(len(prompt), max_length) + ids[len(prompt) :]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="model directory or hub id")
    parser.add_argument("--data", required=True, help="JSON lines with prompt and completion")
    parser.add_argument("--output", required=True, help="directory of the adapter")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--max-length", type=int, default=256)
    chosen = parser.parse_args()

    tokenizer = transformers.AutoTokenizer.from_pretrained(chosen.model, padding_side="right")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows = datasets.load_dataset("json", data_files=chosen.data, split="train")
    rows = rows.map(
        lambda row: encoded(row, tokenizer, chosen.max_length), remove_columns=rows.column_names
    )
    parts = rows.train_test_split(test_size=0.1, seed=0)
    model = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(chosen.model, dtype=torch.float32),
        peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=chosen.output,
            max_steps=chosen.steps,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=1e-3,
            logging_steps=5,
            eval_strategy="steps",
            eval_steps=max(1, chosen.steps // 2),
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=parts["train"],
        eval_dataset=parts["test"].select(range(min(32, len(parts["test"])))),
        data_collator=transformers.DataCollatorForSeq2Seq(tokenizer),
    )
    with patch(model):
        trainer.train()
    model.save_pretrained(chosen.output)


if __name__ == "__main__":
    main()
