"""TRL's SFTTrainer in lowtide's memory: the line with `patch` is all that is new.

    python examples/trl_sft.py --model path/to/model --data my-data.jsonl --output my-adapter

The data is anything that SFTTrainer takes: `text`, `messages`, or `prompt` and `completion`.
"""

import argparse

import datasets
import peft
import torch
import transformers
import trl

from lowtide.integrations.hf import patch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="model directory or hub id")
    parser.add_argument("--data", required=True, help="JSON lines")
    parser.add_argument("--output", required=True, help="directory of the adapter")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--max-length", type=int, default=256)
    chosen = parser.parse_args()

    trainer = trl.SFTTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(chosen.model, dtype=torch.float32),
        processing_class=transformers.AutoTokenizer.from_pretrained(chosen.model),
        train_dataset=datasets.load_dataset("json", data_files=chosen.data, split="train"),
        peft_config=peft.LoraConfig(
            r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        args=trl.SFTConfig(
            output_dir=chosen.output,
            max_steps=chosen.steps,
            max_length=chosen.max_length,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            logging_steps=5,
            save_strategy="no",
            report_to="none",
            bf16=False,
        ),
    )
    with patch(trainer.model):
        trainer.train()
    trainer.save_model(chosen.output)


if __name__ == "__main__":
    main()
