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
from lowtide.model.spec import ModelSpec, RopeSpec
from lowtide.train.run import open_model
from lowtide.train.settings import ModelSettings
from lowtide.weights.checkpoint import dtype_name

from .output import megabytes, settings_of


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
    rows = [
        ("model", f"{model.directory} (model_type {spec.model_type})"),
        ("parameters", f"{spec.n_parameters:,}"),
        ("on disk", f"{megabytes(model.checkpoint.nbytes)} in {len(model.checkpoint.files)} "
                    f"safetensors file(s), {', '.join(model.stored_dtypes)}"),
        ("layers", f"{spec.num_layers} of hidden size {spec.hidden_size}, intermediate size "
                   f"{spec.intermediate_size}"),
        ("attention", f"{spec.num_heads} heads of {spec.head_dim}, {spec.num_kv_heads} key/value "
                      f"heads{_biases(spec)}"),
        ("rope", ", ".join(map(_rope, spec.ropes))),
        ("vocabulary", f"{spec.vocab_size:,}, head {'tied' if spec.tied_head else 'untied'}"),
        ("positions", f"{spec.max_positions:,}"),
        ("computes in", model.dtype_reason),
        ("chat", chat),
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
        }
    )
    return 0


def _biases(spec: ModelSpec) -> str:
    names = sorted(name.split(".")[-1] for name in spec.biased)
    return f", biases on {', '.join(names)}" if names else ""


def _rope(rope: RopeSpec) -> str:
    text = f"{rope.kind}, theta {rope.theta:,g}"
    return text if rope.kind == "default" else f"{text}, factor {rope.factor:g}"


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
