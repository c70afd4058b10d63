"""A family held to transformers and PEFT: tiny random models, the same questions to both.

For development: needs transformers and peft, which nothing else of lowtide imports. The truth in
float64 is transformers' own code, which keeps norms, rotary angles and softmax in float32; with
those in float64 too only the rounding of float64 would be left.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowtide.infer.generate import Generation, generate, logits
from lowtide.methods import gradients
from lowtide.model.adapter import Adapter, LoraConfig
from lowtide.model.batch import Batch
from lowtide.model.decoder import Decoder, load_model

LENGTHS = (23, 1, 9, 31)
"""Sequences of a batch: longer than windows of the examples, one without a label, several."""
TOKENS = 61
RANK = 3
_SEEDS = (5, 6, 7, 8)
"""Of batches: the float32 error of one is a draw of luck, between 0.8 and 2 times transformers'."""


@dataclass(frozen=True)
class Errors:
    """How far one example is from the truth.

    Attributes:
        logits: relative, float64, against transformers.
        logits_float32: our float32 error over transformers', both against float64.
        gradients: worst parameter's, float64, `mesp` against transformers + peft.
        gradients_float32: our float32 error over transformers + peft's, over all parameters.
        autograd: worst parameter's, float64, `mesp` against the plain reference.
        cache: worst logits with the key/value cache against those of the whole, float64.
        greedy: tokens that greedy decoding and transformers' have in common, of `GREEDY`.
        to_peft: logits of PEFT with our adapter file against ours, float64.
        from_peft: logits of ours with PEFT's adapter file against PEFT's, float64.
    """

    logits: float
    logits_float32: float
    gradients: float
    gradients_float32: float
    autograd: float
    cache: float
    greedy: int
    to_peft: float
    from_peft: float


GREEDY = 40


def relative(ours: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the norm of the truth."""
    ours, truth = ours.detach().double(), truth.detach().double()
    return float((ours - truth).norm() / truth.norm().clamp_min(1e-300))


@dataclass(frozen=True)
class Example:
    """A tiny random model on disk, and transformers' view of it."""

    directory: Path
    config: Mapping[str, Any]

    @classmethod
    def write(
        cls, directory: Path, config: Mapping[str, Any], dtype: torch.dtype = torch.float32
    ) -> Example:
        """Save a random model with transformers, beside the config as given.

        Args:
            directory: made if it does not exist.
            config: of one of `Family.examples`.
            dtype: of the weights.

        Returns:
            The example.
        """
        example = cls(directory, config)
        model = _auto_model().from_config(example.hf_config())
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if "norm" in name:  # around what it was made with, which is 0 or 1
                    parameter.copy_(parameter.mean().round() + 0.3 * noise)
                elif name.endswith("bias"):
                    parameter.copy_(0.3 * noise)
                elif "embed_tokens" in name:
                    parameter.copy_(0.5 * noise)
                else:
                    parameter.copy_(noise * parameter.shape[1] ** -0.5)
        model.to(dtype).save_pretrained(directory)
        (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return example

    def hf_config(self) -> Any:
        """Of the text model, where the config has one inside."""
        import transformers

        fields = json.loads(json.dumps(self.config.get("text_config") or self.config))
        return transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)

    def hf_model(self, dtype: torch.dtype) -> Any:
        """As transformers has it, in eager attention."""
        return (
            _auto_model()
            .from_pretrained(
                self.directory, config=self.hf_config(), dtype=dtype, attn_implementation="eager"
            )
            .eval()
        )

    def load(self, dtype: torch.dtype = torch.float64) -> Decoder:
        """As lowtide has it."""
        return load_model(self.directory, compute_dtype=dtype)


def _auto_model() -> Any:
    import transformers

    return transformers.AutoModelForCausalLM


def random_ids(vocab_size: int, lengths: Sequence[int], seed: int = 5) -> list[list[int]]:
    """Random sequences."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in lengths]


def random_adapter(model: Decoder, config: LoraConfig | None = None, seed: int = 1) -> Adapter:
    """An adapter whose B is not zero, or no gradient would reach A. Values are exact in float32.

    Its magnitudes, under DoRA, are the lengths of no weights' rows.

    Args:
        model: the model.
        config: settings; None adapts every linear.
        seed: of the values.

    Returns:
        The adapter.
    """
    adapter = Adapter.create(model, config or LoraConfig(r=RANK, lora_alpha=16), seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for name, parameter in adapter.items():
        if ".lora_B." in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        elif name.endswith("lora_magnitude_vector"):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.mul_(1.0 + 0.3 * noise).copy_(parameter.float())
    return adapter


def hf_logits(model: Any, ids: Sequence[int]) -> Tensor:
    """Logits `(T, V)` of one sequence by transformers."""
    with torch.no_grad():
        found: Tensor = model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
    return found


def labels_of(ids: Sequence[Sequence[int]]) -> list[list[int]]:
    """The ids with every third masked."""
    return [[t if place % 3 else -100 for place, t in enumerate(row)] for row in ids]


def peft_model(example: Example, adapter: Path, dtype: torch.dtype) -> Any:
    """transformers' model under a PEFT adapter that can be trained."""
    from peft import PeftModel

    return PeftModel.from_pretrained(example.hf_model(dtype), adapter, is_trainable=True).eval()


def peft_gradients(model: Any, ids: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """LoRA gradients by transformers + peft, one sequence at a time, by PEFT's names.

    Args:
        model: from `peft_model`.
        ids: sequences; labels are `labels_of` them.

    Returns:
        The gradient of the mean loss by parameter.
    """
    model.zero_grad()
    total, count = torch.zeros(()), 0
    for row, labels in zip(ids, labels_of(ids), strict=True):
        if len(row) > 1:
            found = model(input_ids=torch.tensor([list(row)]), use_cache=False).logits[0, :-1]
            targets = torch.tensor(labels)[1:]
            count += int((targets != -100).sum())
            total = total + F.cross_entropy(found, targets, ignore_index=-100, reduction="sum")
    torch.autograd.backward(total / count)
    return {
        file_name(name): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def file_name(name: str) -> str:
    """The name in PEFT's files of what is called so in its model."""
    return name.replace(".default.", ".").replace("_magnitude_vector.weight", "_magnitude_vector")


def measure(example: Example) -> Errors:
    """Every error but the planner's.

    Args:
        example: a model on disk.

    Returns:
        The errors.
    """
    wide, narrow = example.load(), example.load(torch.float32)
    (ids,) = random_ids(wide.spec.vocab_size, [TOKENS])
    ours = logits(wide, None, ids)
    theirs, theirs32 = (
        hf_logits(example.hf_model(dtype), ids) for dtype in (torch.float64, torch.float32)
    )
    own = relative(logits(narrow, None, ids), ours)
    with TemporaryDirectory() as scratch:
        adapter = random_adapter(narrow)
        adapter.save(scratch)
        grads = _gradient_errors(example, (wide, narrow), Path(scratch))
        to_peft = relative(
            _peft_logits(example, Path(scratch), ids),
            logits(wide, Adapter.load(scratch, wide), ids),
        )
        moved = Adapter.load(scratch, wide)
    return Errors(
        logits=relative(ours, theirs),
        logits_float32=own / relative(theirs32, ours),
        **grads,
        cache=_cache_error(wide, moved, ids),
        greedy=greedy_in_common(example, wide, ids[:5]),
        to_peft=to_peft,
        from_peft=_from_peft(example, wide, ids),
    )


def _gradient_errors(
    example: Example, models: tuple[Decoder, Decoder], adapter: Path
) -> dict[str, float]:
    wide, narrow = models
    adapters = [Adapter.load(adapter, model) for model in models]
    theirs = [peft_model(example, adapter, dtype) for dtype in (torch.float64, torch.float32)]
    worst = dict.fromkeys(("gradients", "autograd"), 0.0)
    own, their = 0.0, 0.0
    for seed in _SEEDS:
        ids = random_ids(wide.spec.vocab_size, LENGTHS, seed)
        batch = Batch.from_sequences(ids, labels_of(ids))
        truth = gradients(wide, adapters[0], batch, "mesp").grads
        plain = gradients(wide, adapters[0], batch, "autograd").grads
        ours32 = gradients(narrow, adapters[1], batch, "mesp").grads
        peft, peft32 = (peft_gradients(model, ids) for model in theirs)
        if set(peft) != set(truth):
            raise AssertionError(f"parameters differ: {sorted(set(peft) ^ set(truth))[:4]}")
        own = math.hypot(own, _distance(ours32, truth))
        their = math.hypot(their, _distance(peft32, truth))
        for name, grads in (("gradients", peft), ("autograd", plain)):
            found = max(relative(truth[parameter], grad) for parameter, grad in grads.items())
            worst[name] = max(worst[name], found)
    return {**worst, "gradients_float32": own / their}


def _distance(ours: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> float:
    """The norm of the difference over all parameters."""
    return math.hypot(*(float((ours[name].double() - truth[name]).norm()) for name in truth))


def _cache_error(model: Decoder, adapter: Adapter, ids: Sequence[int]) -> float:
    """The worst of all lengths from 7 on, fed a token at a time."""
    generation, worst = Generation(model, adapter, len(ids)), 0.0
    whole = logits(model, adapter, ids)
    for stop in range(7, len(ids) + 1):
        fed = generation.feed(ids[:7] if stop == 7 else ids[stop - 1 : stop])
        truth = whole
        if model.changes_between(stop, len(ids)):  # then what follows changes what came before
            truth = logits(model, adapter, ids[:stop])
        worst = max(worst, relative(fed, truth[stop - 1]))
    return worst


def greedy_in_common(example: Example, model: Decoder, prompt: Sequence[int]) -> int:
    """Tokens until greedy decoding differs from transformers' with its cache, at most GREEDY.

    Args:
        example: the model.
        model: the same, loaded.
        prompt: where both begin.

    Returns:
        How many are the same.
    """
    theirs = example.hf_model(torch.float64).generate(
        torch.tensor([list(prompt)]), max_new_tokens=GREEDY, min_new_tokens=GREEDY,
        do_sample=False, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    ours = list(generate(model, None, prompt, GREEDY))
    same = [a == b for a, b in zip(ours, theirs[0, len(prompt) :].tolist(), strict=True)]
    return same.index(False) if False in same else len(same)


def _peft_logits(example: Example, adapter: Path, ids: Sequence[int]) -> Tensor:
    from peft import PeftModel

    return hf_logits(PeftModel.from_pretrained(example.hf_model(torch.float64), adapter), ids)


def _from_peft(example: Example, model: Decoder, ids: Sequence[int]) -> float:
    """An adapter that PEFT makes on all linears and saves, opened here."""
    import peft

    config = peft.LoraConfig(
        r=RANK, lora_alpha=16, target_modules="all-linear", init_lora_weights=False
    )
    torch.manual_seed(3)
    theirs = peft.get_peft_model(example.hf_model(torch.float64), config).eval()
    with TemporaryDirectory() as scratch:
        theirs.save_pretrained(scratch)
        ours = logits(model, Adapter.load(scratch, model), ids)
    return relative(ours, hf_logits(theirs, ids))
