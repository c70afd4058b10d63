"""Trainer, SFTTrainer and accelerate on a patched model, beside the same without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import datasets
import peft
import pytest
import torch
import transformers
import trl
from accelerate.state import AcceleratorState
from helpers import asset
from hf_small import step
from torch import Tensor

from lowtide.integrations.hf import patch
from lowtide.integrations.hf.outputs import LazyLogits

CURVE = 1e-4
"""Of losses: what rounding in float32 makes of 50 updates."""


@pytest.fixture(scope="module")
def stories() -> Path:
    return asset("models/stories260K/hf-llama")


def tokenizer_of(stories: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(stories)


def model_of(stories: Path, **lora: Any) -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32)
    config = peft.LoraConfig(
        r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM", **lora
    )
    return peft.get_peft_model(model, config)


def texts() -> datasets.Dataset:
    rows = [
        {"text": f"Once upon a time there was dog {i}. It ran{' fast' * (i % 7)} and saw a cat."}
        for i in range(24)
    ]
    return datasets.Dataset.from_list(rows)


def dialogues() -> datasets.Dataset:
    return datasets.Dataset.from_list(
        [{"prompt": f"The dog {i} said:", "completion": " hello" * (1 + i % 5)} for i in range(24)]
    )


def settings(output: Path, steps: int, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(output),
        "per_device_train_batch_size": 4,
        "max_steps": steps,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        **more,
    }


def sft(
    stories: Path, output: Path, steps: int, data: datasets.Dataset, **more: Any
) -> trl.SFTTrainer:
    return trl.SFTTrainer(
        model=model_of(stories),
        processing_class=tokenizer_of(stories),
        train_dataset=data,
        eval_dataset=data.select(range(6)),
        args=trl.SFTConfig(**settings(output, steps, max_length=48, **more)),
    )


def curve(trainer: Any, key: str = "loss") -> list[float]:
    return [line[key] for line in trainer.state.log_history if key in line]


def assert_close(ours: list[float], theirs: list[float], bound: float = CURVE) -> None:
    assert len(ours) == len(theirs) > 0
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) <= bound


def both(stories: Path, tmp_path: Path, steps: int, data: datasets.Dataset, **more: Any) -> Any:
    """A run without the patch, and one with it; (trainer, evaluation) each."""
    found = []
    for patched in (False, True):
        trainer = sft(stories, tmp_path / str(patched), steps, data, **more)
        if patched:
            patch(trainer.model)
        trainer.train()
        found.append((trainer, trainer.evaluate()))
    return found


def test_fifty_steps_of_sft(stories: Path, tmp_path: Path) -> None:
    """With accumulation, clipping, checkpointing (TRL's default), TRL's metrics and evaluation."""
    (plain, truth), (ours, found) = both(
        stories, tmp_path, 50, texts(), gradient_accumulation_steps=2, max_grad_norm=0.5
    )
    for key in ("loss", "entropy", "mean_token_accuracy", "grad_norm"):
        # A gradient's norm is a few times as large as a loss, and so is its rounding.
        bound = 1e-3 if key == "grad_norm" else CURVE
        if key == "mean_token_accuracy":
            bound = 5e-3  # one token of 240 whose two best are as good as the same
        assert_close(curve(ours, key), curve(plain, key), bound)
    assert min(curve(ours)) < 0.5 * curve(ours)[0]
    for key in ("eval_loss", "eval_entropy"):
        assert abs(found[key] - truth[key]) <= CURVE
    assert found["eval_num_tokens"] == truth["eval_num_tokens"]


@pytest.mark.parametrize("kind", ["completions", "packed", "dft"])
def test_ways_of_sft(kind: str, stories: Path, tmp_path: Path) -> None:
    data = dialogues() if kind == "completions" else texts()
    more: dict[str, Any] = {"packed": {"packing": True}, "dft": {"loss_type": "dft"}}.get(kind, {})
    (plain, truth), (ours, found) = both(stories, tmp_path, 6, data, **more)
    assert_close(curve(ours), curve(plain))
    assert_close(curve(ours, "entropy"), curve(plain, "entropy"))
    assert abs(found["eval_loss"] - truth["eval_loss"]) <= CURVE


@pytest.mark.parametrize("place", ["before", "after"])
def test_no_logits_are_formed_in_sft(
    place: str, stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the model is patched before the trainer has it or after: the head is never called."""
    import trl.trainer.utils

    def never(*_: Any) -> None:
        raise AssertionError("TRL's chunks of logits were formed")

    monkeypatch.setattr(trl.trainer.utils._ChunkedLogProbFunction, "apply", never)
    model = model_of(stories)
    if place == "before":
        patch(model)
    trainer = trl.SFTTrainer(
        model=model,
        processing_class=tokenizer_of(stories),
        train_dataset=texts(),
        eval_dataset=texts(),
        args=trl.SFTConfig(**settings(tmp_path, 2, max_length=48)),
    )
    if place == "after":
        patch(model)
    plain = torch.nn.Linear.forward

    def linear(self: torch.nn.Linear, x: Tensor) -> Tensor:
        assert self is not model.get_base_model().lm_head
        return plain(self, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", linear)
    trainer.train()
    trainer.evaluate()


def test_another_fused_head_than_sfts_gets_lowtides_blocks_and_trls_head(stories: Path) -> None:
    import trl.trainer.utils

    model = model_of(stories)
    trl.trainer.utils.add_fused_lm_head(
        model.get_base_model(), temperature=0.7, outputs=("log_probs", "mean_logits")
    )
    model.train()
    ids = torch.arange(5, 35).view(2, 15)
    call = {"input_ids": ids, "labels": ids, "fused_lm_head": True}
    loss, theirs = step(model, **call)
    with patch(model):
        ours = step(model, **call)
        means = model(**call).mean_logits
    assert ours[0] == pytest.approx(loss, rel=1e-5)
    assert torch.allclose(means, model(**call).mean_logits, atol=1e-4)
    for name, grad in theirs.items():
        assert torch.allclose(ours[1][name], grad, rtol=1e-3, atol=1e-5 * float(grad.norm()))


def plain_trainer(stories: Path, output: Path, steps: int, **more: Any) -> transformers.Trainer:
    tokenizer = tokenizer_of(stories)
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "right"
    data = texts().map(lambda row: tokenizer(row["text"]), remove_columns=["text"])
    own = {name: more.pop(name) for name in ("compute_metrics", "callbacks") if name in more}
    return transformers.Trainer(
        model=model_of(stories),
        args=transformers.TrainingArguments(**settings(output, steps, **more)),
        train_dataset=data,
        eval_dataset=data.select(range(6)),
        data_collator=transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False),
        **own,
    )


def test_trainer_with_callbacks_evaluation_and_metrics(stories: Path, tmp_path: Path) -> None:
    class Told(transformers.TrainerCallback):
        def __init__(self) -> None:
            self.steps = 0

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.steps += 1

    def accuracy(found: Any) -> dict[str, float]:
        best, labels = found.predictions.argmax(-1)[:, :-1], found.label_ids[:, 1:]
        return {"accuracy": float((best == labels)[labels != -100].mean())}

    runs = []
    for patched in (False, True):
        told = Told()
        trainer = plain_trainer(
            stories, tmp_path / str(patched), 8, gradient_accumulation_steps=2,
            eval_strategy="steps", eval_steps=4, compute_metrics=accuracy, callbacks=[told],
        )  # fmt: skip
        if patched:
            patch(trainer.model)
        trainer.train()
        assert told.steps == 8
        runs.append(trainer)
    for key in ("loss", "eval_loss", "eval_accuracy"):
        assert_close(curve(runs[1], key), curve(runs[0], key), 5e-3 if "acc" in key else CURVE)


def test_evaluation_of_the_loss_only_forms_no_logits(
    stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(_: LazyLogits) -> Tensor:
        raise AssertionError("logits were formed")

    trainer = plain_trainer(stories, tmp_path, 1)
    truth = trainer.evaluate()["eval_loss"]
    monkeypatch.setattr(LazyLogits, "formed", never)
    patch(trainer.model)
    assert abs(trainer.evaluate()["eval_loss"] - truth) <= CURVE


def test_label_smoothing_uses_logits_as_ever(stories: Path, tmp_path: Path) -> None:
    runs = []
    for patched in (False, True):
        more = {"label_smoothing_factor": 0.1}
        trainer = plain_trainer(stories, tmp_path / str(patched), 3, **more)
        if patched:
            patch(trainer.model)
        trainer.train()
        runs.append(trainer)
    assert_close(curve(runs[1]), curve(runs[0]))


def test_a_run_resumes_from_its_checkpoint(stories: Path, tmp_path: Path) -> None:
    """With dropout, whose masks depend on torch's generator, which a checkpoint has."""

    def trainer(output: Path, steps: int) -> Any:
        torch.manual_seed(0)
        found = trl.SFTTrainer(
            model=model_of(stories, lora_dropout=0.2),
            processing_class=tokenizer_of(stories),
            train_dataset=texts(),
            args=trl.SFTConfig(
                **settings(
                    output, steps, max_length=48, save_strategy="steps", save_steps=4,
                    lr_scheduler_type="constant",
                )
            ),
        )  # fmt: skip
        patch(found.model)
        return found

    whole = trainer(tmp_path / "whole", 8)
    whole.train()
    trainer(tmp_path / "parts", 4).train()
    rest = trainer(tmp_path / "parts", 8)
    rest.train(resume_from_checkpoint=True)
    assert curve(rest) == curve(whole)
    saved = tmp_path / "whole" / "checkpoint-8"
    base = transformers.AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32)
    again = peft.PeftModel.from_pretrained(base, saved)
    for name, parameter in again.state_dict().items():
        assert torch.equal(parameter, whole.model.state_dict()[name])


@pytest.mark.parametrize("first", ["patch", "prepare"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerates_prepare(first: str, precision: str, stories: Path) -> None:
    model = model_of(stories)
    ids = torch.arange(5, 35).view(2, 15)
    plain = step(model, input_ids=ids, labels=ids)
    before = model(input_ids=ids).logits
    AcceleratorState._reset_state(reset_partial_state=True)  # accelerate has one for all
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)
    handle = patch(model) if first == "patch" else None
    prepared = accelerator.prepare(model)
    handle = handle or patch(model)
    model.zero_grad()
    loss = prepared(input_ids=ids, labels=ids).loss
    accelerator.backward(loss)
    assert float(loss.detach()) == pytest.approx(plain[0], rel=1e-5)
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert set(found) == set(plain[1])
    handle.unpatch()
    left = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert torch.equal(left(input_ids=ids).logits, before)
