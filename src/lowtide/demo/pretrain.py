"""Train the demo's base model from nothing: tokenizer, conversations, optimiser loop.

Needs the dev extra (transformers), which only the functions below import. Everything follows
from `Recipe`, so that the same machine with the same number of threads makes the same bytes.
"""

from __future__ import annotations

import time
from collections.abc import Container, Iterator
from dataclasses import dataclass
from itertools import count
from random import Random
from typing import Any, NamedTuple

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from lowtide.demo.assets import BOS, END, PAD, ROLES, SPECIAL_TOKENS, prompt_text
from lowtide.demo.muon import Muon
from lowtide.demo.requests import ANNOUNCE, Example, exact_match, generic_examples, stream
from lowtide.demo.slots import DRILL

IGNORED = -100
_SYSTEM_PROMPTS = (
    "You run this house.",
    "You are a home assistant. Answer with one JSON call.",
    "Answer in JSON.",
    "You are a helpful assistant.",
)
# Qwen2's own splitting, so that every loader of a Qwen2 checkpoint splits text as we did.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Recipe:
    """All that decides what the base model becomes."""

    vocab_size: int = 1536
    hidden_size: int = 192
    intermediate_size: int = 512
    num_layers: int = 4
    num_heads: int = 6
    num_kv_heads: int = 3
    max_position_embeddings: int = 512
    rope_theta: float = 10_000.0
    initializer_range: float = 0.05
    steps: int = 2400
    batch_size: int = 32
    matrix_learning_rate: float = 0.02
    other_learning_rate: float = 0.01
    warmup_steps: int = 50
    constant_until: float = 0.15
    drill_until: float = 0.3
    seed: int = 1
    tokenizer_sample: int = 20_000
    held_out: int = 500
    held_out_seed: int = 7_000_001
    threads: int = 1


class Rows(NamedTuple):
    """A batch of conversations padded on the right: `(B, T)` ids and labels."""

    ids: torch.Tensor
    labels: torch.Tensor


def train_tokenizer(recipe: Recipe, exclude: Container[str] = ()) -> Tokenizer:
    """A byte-level BPE over generated requests and calls."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sample = generic_examples(recipe.seed, recipe.tokenizer_sample, exclude)
    texts = (text for drawn in sample for text in (drawn.prompt, drawn.completion))
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a special token, which the tokenizer is known to have."""
    found = tokenizer.token_to_id(token)
    assert found is not None, token
    return found


def _conversation(
    examples: Iterator[Example], drills: Iterator[Example], drilled: float, rng: Random
) -> list[tuple[str, bool]]:
    """Pieces of text, and whether each is an answer to learn: mostly one turn, up to three."""
    pieces = [(BOS, False)]
    if rng.random() < 0.04:
        pieces.append((f"{ROLES['system']}{rng.choice(_SYSTEM_PROMPTS)}{END}", False))
    for _ in range(rng.choices((1, 2, 3), (8, 1, 1))[0]):
        drawn = next(drills if rng.random() < drilled else examples)
        pieces.append((f"{ROLES['user']}{drawn.prompt}{END}{ROLES['assistant']}", False))
        pieces.append((f"{drawn.completion}{END}", True))
    return pieces


def batches(recipe: Recipe, tokenizer: Tokenizer, exclude: Container[str]) -> Iterator[Rows]:
    """Endless batches; rows of similar length share a batch, so that little is padding."""
    rng, examples = Random(recipe.seed), stream(recipe.seed, exclude)
    drills = stream(recipe.seed + 1, exclude, DRILL, (ANNOUNCE,))
    pad = token_id(tokenizer, PAD)
    pool_batches = 50
    for pool in count():
        drilled = 0.5 if pool * pool_batches < recipe.drill_until * recipe.steps else 0.05
        rows = []
        for _ in range(pool_batches * recipe.batch_size):
            ids: list[int] = []
            labels: list[int] = []
            for text, learned in _conversation(examples, drills, drilled, rng):
                piece = tokenizer.encode(text).ids
                ids += piece
                labels += piece if learned else [IGNORED] * len(piece)
            rows.append((ids, labels))
        rows.sort(key=lambda row: len(row[0]))
        starts = list(range(0, len(rows), recipe.batch_size))
        rng.shuffle(starts)
        for start in starts:
            chosen = rows[start : start + recipe.batch_size]
            width = max(len(ids) for ids, _ in chosen)
            yield Rows(
                torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in chosen]),
                torch.tensor([labs + [IGNORED] * (width - len(labs)) for _, labs in chosen]),
            )


def new_model(recipe: Recipe, tokenizer: Tokenizer) -> Any:
    """A freshly initialised `Qwen2ForCausalLM` in float32."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(recipe.seed)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=recipe.vocab_size,
            hidden_size=recipe.hidden_size,
            intermediate_size=recipe.intermediate_size,
            num_hidden_layers=recipe.num_layers,
            num_attention_heads=recipe.num_heads,
            num_key_value_heads=recipe.num_kv_heads,
            max_position_embeddings=recipe.max_position_embeddings,
            rope_parameters={"rope_type": "default", "rope_theta": recipe.rope_theta},
            initializer_range=recipe.initializer_range,
            tie_word_embeddings=True,
            use_sliding_window=False,
            use_cache=False,
            bos_token_id=token_id(tokenizer, BOS),
            eos_token_id=token_id(tokenizer, END),
            pad_token_id=token_id(tokenizer, PAD),
        )
    )


def _fraction(recipe: Recipe, step: int) -> float:
    """The share of the learning rates used at `step`: up, level, then linearly down to 1%."""
    up = min(1.0, (step + 1) / recipe.warmup_steps)
    down = (1 - step / recipe.steps) / (1 - recipe.constant_until)
    return up * min(1.0, max(0.01, down))


def pretrain(recipe: Recipe, tokenizer: Tokenizer, exclude: Container[str]) -> Any:
    """Train a new model on generic requests whose core is not in `exclude`."""
    model = new_model(recipe, tokenizer)
    embedding = model.get_input_embeddings().weight
    matrices = [p for p in model.parameters() if p.ndim == 2 and p is not embedding]
    others = [embedding, *(p for p in model.parameters() if p.ndim != 2)]
    muon = Muon(matrices)
    adam = torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    started, losses = time.perf_counter(), []
    for step, rows in zip(range(recipe.steps), batches(recipe, tokenizer, exclude), strict=False):
        fraction = _fraction(recipe, step)
        loss = model(input_ids=rows.ids, labels=rows.labels).loss
        loss.backward()
        adam.param_groups[0]["lr"] = recipe.other_learning_rate * fraction
        adam.step()
        adam.zero_grad(set_to_none=True)
        muon.step(recipe.matrix_learning_rate * fraction)
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            mean, seconds = sum(losses[-100:]) / 100, time.perf_counter() - started
            print(f"step {step + 1}: loss {mean:.4f}, {seconds:.0f} s", flush=True)
    return model.eval()


def answer(model: Any, tokenizer: Tokenizer, requests: list[str], limit: int = 64) -> list[str]:
    """Greedy answers, in the order of `requests`."""
    end, pad = token_id(tokenizer, END), token_id(tokenizer, PAD)
    prompts = [tokenizer.encode(prompt_text(request)).ids for request in requests]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers = [""] * len(prompts)
    for start in range(0, len(order), 50):
        chosen = order[start : start + 50]
        width = max(len(prompts[index]) for index in chosen)
        ids = [[pad] * (width - len(prompts[i])) + prompts[i] for i in chosen]
        mask = [[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in chosen]
        with torch.inference_mode():
            out = model.generate(
                input_ids=torch.tensor(ids),
                attention_mask=torch.tensor(mask),
                max_new_tokens=limit,
                do_sample=False,
                use_cache=True,
                eos_token_id=end,
                pad_token_id=pad,
            )
        for index, row in zip(chosen, out[:, width:].tolist(), strict=True):
            kept = row[: row.index(end)] if end in row else row
            answers[index] = tokenizer.decode(kept, skip_special_tokens=False)
    return answers


def accuracy(model: Any, tokenizer: Tokenizer, examples: list[Example]) -> float:
    """The share of examples whose greedy answer is exactly right."""
    answers = answer(model, tokenizer, [drawn.prompt for drawn in examples])
    right = sum(
        exact_match(given, drawn.completion) for given, drawn in zip(answers, examples, strict=True)
    )
    return right / len(examples)
