"""What the commands that generate text share."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

from lowtide.config import setting
from lowtide.data.tokenizer import Tokenizer
from lowtide.errors import LowtideWarning
from lowtide.model.decoder import Decoder
from lowtide.train.run import open_model
from lowtide.train.settings import ModelSettings


@dataclass(frozen=True, kw_only=True)
class SpeakingSettings(ModelSettings):
    """How text is read and written."""

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
    temperature: float = setting(0.0, help="0 is greedy; higher is more varied", minimum=0)
    top_p: float = setting(1.0, help="sample from the likeliest tokens of this mass", above=0,
                           maximum=1)  # fmt: skip

    def opened(self) -> tuple[Decoder, Tokenizer]:
        """The model and its tokenizer; warns where they may not belong together."""
        model = open_model(self)
        directory = Path(self.tokenizer).expanduser() if self.tokenizer else model.directory
        tokenizer = Tokenizer.load(directory, self.chat_template)
        if (mismatch := tokenizer.mismatch(model.spec.vocab_size)) is not None:
            warnings.warn(mismatch, LowtideWarning, stacklevel=2)
        return model, tokenizer


@dataclass(frozen=True, kw_only=True)
class ContextSettings(SpeakingSettings):
    """How much of a conversation there is room for."""

    max_tokens: int = setting(1024, help="tokens of an answer at most", minimum=1)
    context: int | None = setting(
        None,
        help="tokens of prompt and answer together; none takes the model's positions, up to 4096",
        minimum=2,
    )
