"""Fine-tune the bundled model on the household with PEFT: `python -m lowtide.demo.check`.

An independent check that `FINE_TUNING` is enough, made with transformers and peft (the dev
extra) and none of lowtide's own training code.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import Tokenizer

from lowtide.demo.assets import END, PAD, asset_dir, prompt_text
from lowtide.demo.household import FINE_TUNING, FineTuning, household
from lowtide.demo.pretrain import IGNORED, accuracy, token_id
from lowtide.demo.requests import Example, generic_examples


def _batches(
    examples: Sequence[Example], tokenizer: Tokenizer, batch_size: int, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Shuffled passes over the examples; the loss is on the answers only."""
    rng, pad = Random(seed), token_id(tokenizer, PAD)
    rows = []
    for drawn in examples:
        prompt = tokenizer.encode(prompt_text(drawn.prompt)).ids
        completion = tokenizer.encode(drawn.completion + END).ids
        rows.append((prompt + completion, [IGNORED] * len(prompt) + completion))
    while True:
        rng.shuffle(rows)
        for start in range(0, len(rows) - batch_size + 1, batch_size):
            chosen = rows[start : start + batch_size]
            width = max(len(ids) for ids, _ in chosen)
            yield (
                torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in chosen]),
                torch.tensor([labs + [IGNORED] * (width - len(labs)) for _, labs in chosen]),
            )


def fine_tune(
    model: Any, tokenizer: Tokenizer, examples: Sequence[Example], settings: FineTuning, seed: int
) -> Any:
    """LoRA with peft and AdamW in float32, the learning rate falling linearly to zero."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    tuned: Any = get_peft_model(
        model,
        LoraConfig(
            r=settings.r,
            lora_alpha=settings.lora_alpha,
            target_modules=settings.target_modules,
            task_type="CAUSAL_LM",
        ),
    )
    trained = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=0.0)
    batches = _batches(examples, tokenizer, settings.batch_size, seed)
    for step, (ids, labels) in zip(range(settings.iters), batches, strict=False):
        left = 1 - step / settings.iters
        optimizer.param_groups[0]["lr"] = settings.learning_rate * left
        tuned(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return tuned.eval()


def check(directory: Path, settings: FineTuning, seed: int) -> dict[str, float]:
    """Exact match before and after, on the household and on generic requests."""
    from transformers import AutoModelForCausalLM

    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model.eval()
    split, generic = household(), generic_examples(8_000_001, 100)
    before = accuracy(model, tokenizer, split.test)
    generic_before = accuracy(model, tokenizer, generic)
    wall, cpu = time.perf_counter(), time.process_time()
    tuned = fine_tune(model, tokenizer, split.train, settings, seed)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {
        "before": before,
        "after": accuracy(tuned, tokenizer, split.test),
        "valid_after": accuracy(tuned, tokenizer, split.valid),
        "generic_before": generic_before,
        "generic_after": accuracy(tuned, tokenizer, generic),
        "train_wall_s": wall,
        "train_cpu_s": cpu,
    }


def main() -> None:
    """The command line; every field of `FineTuning` has a flag."""
    parser = argparse.ArgumentParser(description="Fine-tune the bundled model with PEFT.")
    parser.add_argument("--model", type=Path, default=asset_dir())
    parser.add_argument("--seed", type=int, default=0)
    for item in fields(FineTuning):
        flag = "--" + item.name.replace("_", "-")
        parser.add_argument(flag, type=type(item.default), default=None)
    given = vars(parser.parse_args())
    directory, seed = given.pop("model"), given.pop("seed")
    settings = replace(FINE_TUNING, **{k: v for k, v in given.items() if v is not None})
    for name, value in check(directory, settings, seed).items():
        print(f"{name}: {value:.3f}")


if __name__ == "__main__":
    main()
