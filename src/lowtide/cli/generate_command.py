"""`lowtide generate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lowtide.config import setting
from lowtide.data.decoding import StreamDecoder
from lowtide.data.prompts import prompt_ids
from lowtide.infer.generate import Sampling, generate
from lowtide.model.adapter import Adapter
from lowtide.train.settings import MAX_SEED

from .output import settings_of
from .speaking import SpeakingSettings


@dataclass(frozen=True, kw_only=True)
class GenerateSettings(SpeakingSettings):
    """Settings of `lowtide generate`."""

    prompt: str = setting("", help="text to answer or continue; empty starts from BOS")
    adapter_path: str | None = setting(None, help="PEFT adapter directory to apply", filled=True)
    max_tokens: int = setting(256, help="tokens to generate at most", minimum=1)
    seed: int = setting(0, help="seed of sampling", minimum=0, maximum=MAX_SEED)


def run(argv: Sequence[str]) -> int:
    """Generate, streaming the text as it comes."""
    settings, output = settings_of(
        GenerateSettings, "generate", "Generate text, with or without an adapter.", argv
    )
    model, tokenizer = settings.opened()
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
