"""TRL's SFTTrainer with PEFT's LoRA, float32 on the CPU, with our patch or without, measured."""

from __future__ import annotations

from typing import Any

import torch

from .peer_child import step_meter


def run(settings: dict[str, Any]) -> dict[str, Any]:
    """Train on random token ids, as lowtide's own cases do.

    Args:
        settings: of the case, `model` being a directory.

    Returns:
        `steps`, the first of which warms up, and the versions of the libraries.
    """
    import datasets
    import peft
    import transformers
    import trl

    torch.manual_seed(0)
    total = settings["steps"] + 1
    with step_meter() as loaded:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            settings["model"], dtype=torch.float32
        )
        meter = loaded()

        class Told(transformers.TrainerCallback):
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                meter.begin()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                meter.end()

        ids = torch.randint(0, model.config.vocab_size, (total, settings["seq_len"]))
        trainer = trl.SFTTrainer(
            model=model,
            processing_class=_tokenizer(),
            train_dataset=datasets.Dataset.from_dict({"input_ids": ids.tolist()}),
            peft_config=peft.LoraConfig(
                r=settings["lora_r"],
                lora_alpha=2 * settings["lora_r"],
                target_modules=settings["target_modules"],
                task_type="CAUSAL_LM",
            ),
            args=_arguments(settings, total),
            callbacks=[Told()],
        )
        if settings["peer"].endswith("+patch"):
            from lowtide.integrations.hf import patch

            patch(trainer.model)
        n_parameters = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        trainer.train()
    versions = {lib.__name__: lib.__version__ for lib in (trl, peft, transformers)}
    return {
        "n_adapter_parameters": n_parameters,
        "model_anon_bytes": meter.model_bytes,
        "versions": versions,
        "steps": meter.steps,
    }


def _arguments(settings: dict[str, Any], total: int) -> Any:
    import trl

    return trl.SFTConfig(
        output_dir="trl",
        per_device_train_batch_size=settings["batch_size"],
        max_steps=total,
        optim=settings["optimizer"],
        gradient_checkpointing=settings["checkpointing"],
        max_length=settings["seq_len"],
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataset_kwargs={"skip_prepare_dataset": True},
    )


def _tokenizer() -> Any:
    """The least that the trainer asks for: a shape has no tokenizer, and no text is tokenised."""
    import tokenizers
    import transformers

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0}, unk_token="<pad>"))
    make: Any = transformers.PreTrainedTokenizerFast  # not typed
    return make(tokenizer_object=words, pad_token="<pad>", eos_token="<pad>")
