"""`lowtide info`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from lowtide.data.tokenizer import Tokenizer
from lowtide.data.turns import template_traits
from lowtide.errors import LowtideError, LowtideWarning
from lowtide.model.decoder import Decoder
from lowtide.model.words import in_words
from lowtide.train.budget import PlanSettings, Question
from lowtide.train.run import open_model
from lowtide.train.settings import ModelSettings
from lowtide.weights.checkpoint import dtype_name

from .output import megabytes, settings_of

_LENGTHS = (256, 1024, 4096)
_SETTING = "mesp, LoRA on all linears with the usual settings"


def run(argv: Sequence[str]) -> int:
    """Print what the model is; its weights are checked but not read."""
    if argv and not argv[0].startswith("-"):
        argv = ["--model", *argv]
    settings, output = settings_of(
        ModelSettings, "info", "What a model directory holds, and how it would be computed.", argv
    )
    model = open_model(settings)
    spec = model.spec
    chat, chat_document = _chat(model)
    stored = model.checkpoint.bytes_by_storage(spec.tensor_shapes())
    training, dora = (_training_bytes(settings, model, use_dora=kind) for kind in (False, True))
    shortest = min(training)
    rows = [
        ("model", f"{model.path} (model_type {spec.model_type})"),
        ("parameters", f"{spec.n_parameters:,}"),
        ("on disk", f"{megabytes(model.checkpoint.nbytes)} in {len(model.checkpoint.files)} "
                    f"{model.checkpoint.kind} file(s): "
                    + ", ".join(f"{name} {megabytes(size)}" for name, size in stored.items())),
        *in_words(spec),
        ("computes in", model.dtype_reason),
        ("chat", chat),
        ("training", ", ".join(f"{megabytes(size)} at {length:,} tokens"
                               for length, size in training.items())
                     + f" ({_SETTING}; predicted, without weights)"),
        ("adapters", "LoRA; rsLoRA (--use-rslora); DoRA (--use-dora), which takes "
                     f"{megabytes(dora[shortest] - training[shortest])} more at {shortest:,} "
                     "tokens"),
    ]  # fmt: skip
    for name, text in rows:
        output.say(f"{name:<12} {text}")
    output.result(
        {
            "model_type": spec.model_type,
            "n_parameters": spec.n_parameters,
            "bytes_on_disk": model.checkpoint.nbytes,
            "stored_dtypes": model.stored_dtypes,
            "compute_dtype": dtype_name(model.compute_dtype),
            "compute_dtype_reason": model.dtype_reason,
            "num_layers": spec.num_layers,
            "hidden_size": spec.hidden_size,
            "vocab_size": spec.vocab_size,
            "max_positions": spec.max_positions,
            "tied_head": spec.tied_head,
            "chat_template": chat_document,
            "bytes_by_storage": stored,
            "target_modules": list(spec.linears),
            "described": dict(in_words(spec)),
            "training_bytes": {str(length): size for length, size in training.items()},
            "dora_training_bytes": {str(length): size for length, size in dora.items()},
        }
    )
    return 0


def _training_bytes(settings: ModelSettings, model: Decoder, *, use_dora: bool) -> dict[int, int]:
    """The predicted peak of a training step by tokens of its one sequence."""
    lengths = [n for n in _LENGTHS if n < model.spec.max_positions] or [model.spec.max_positions]
    given = {**asdict(settings), "use_dora": use_dora}

    def peak(length: int) -> int:
        question = Question(PlanSettings(**{**given, "max_seq_length": length}), model)
        return question.plan().predicted_peak_bytes

    return {length: peak(length) for length in lengths}


def _chat(model: Decoder) -> tuple[str, dict[str, Any] | None]:
    """What the chat template does, in words and as JSON; the tokenizer is read for it."""
    try:
        tokenizer = Tokenizer.load(model.directory)
        if (mismatch := tokenizer.mismatch(model.spec.vocab_size)) is not None:
            warnings.warn(mismatch, LowtideWarning, stacklevel=1)
        if tokenizer.template is None:
            return "no template; chats need --chat-template FILE, or --tokenizer DIR with one", None
        traits = template_traits(tokenizer.template)
    except LowtideError as error:  # the model itself can be used without
        return f"unknown: {error}", None
    named = ", with another for tools" if tokenizer.template.tools_source else ""
    return f"the directory's own template{named}: {traits.words()}", asdict(traits)
