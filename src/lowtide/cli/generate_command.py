"""`lowtide generate`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lowtide.config import setting
from lowtide.data.decoding import StreamDecoder
from lowtide.data.prompts import prompt_ids
from lowtide.data.tokenizer import Tokenizer
from lowtide.errors import LowtideWarning
from lowtide.infer.generate import Sampling, generate
from lowtide.model.adapter import Adapter
from lowtide.train.run import open_model
from lowtide.train.settings import MAX_SEED, ModelSettings

from .output import settings_of


@dataclass(frozen=True, kw_only=True)
class GenerateSettings(ModelSettings):
    """Settings of `lowtide generate`."""

    prompt: str = setting("", help="text to answer or continue; empty starts from BOS")
    adapter_path: str | None = setting(None, help="PEFT adapter directory to apply", filled=True)
    tokenizer: str | None = setting(
        None,
        help="directory with tokenizer.json, where the model's own is not to be used",
        filled=True,
    )
    chat_template: str | None = setting(
        None,
        help="Jinja file to use instead of the tokenizer's chat template, or 'none'",
        filled=True,
    )
    max_tokens: int = setting(256, help="tokens to generate at most", minimum=1)
    temperature: float = setting(0.0, help="0 is greedy; higher is more varied", minimum=0)
    top_p: float = setting(1.0, help="sample from the likeliest tokens of this mass", above=0,
                           maximum=1)  # fmt: skip
    seed: int = setting(0, help="seed of sampling", minimum=0, maximum=MAX_SEED)


def run(argv: Sequence[str]) -> int:
    """Generate, streaming the text as it comes."""
    settings, output = settings_of(
        GenerateSettings, "generate", "Generate text, with or without an adapter.", argv
    )
    model = open_model(settings)
    directory = Path(settings.tokenizer).expanduser() if settings.tokenizer else model.directory
    tokenizer = Tokenizer.load(directory, settings.chat_template)
    if (mismatch := tokenizer.mismatch(model.spec.vocab_size)) is not None:
        warnings.warn(mismatch, LowtideWarning, stacklevel=1)
    adapter = None
    if settings.adapter_path is not None:
        adapter = Adapter.load(Path(settings.adapter_path).expanduser(), model)
    prompt = prompt_ids(tokenizer, settings.prompt)
    decoder = StreamDecoder(tokenizer)
    for token in prompt:
        decoder.push(token)
    ids, pieces = [], []
    sampling = Sampling(settings.temperature, settings.top_p, settings.seed)
    stops = tokenizer.stop_ids
    for token in generate(model, adapter, prompt, settings.max_tokens, sampling, stops):
        ids.append(token)
        pieces.append(decoder.push(token))
        output.say(pieces[-1], end="")
    pieces.append(decoder.finish())
    output.say(pieces[-1])
    output.result({"text": "".join(pieces), "n_tokens": len(ids)})
    return 0
