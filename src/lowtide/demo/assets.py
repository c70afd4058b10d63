"""Where the bundled model lies, and the text format that it was trained on.

A conversation is `<|bos|>` and then one `<|role|>text<|end|>` per message, without white space
between them; an answer starts after `<|assistant|>` and ends with `<|end|>`, the eos token.
"""

from __future__ import annotations

from pathlib import Path

BOS = "<|bos|>"
END = "<|end|>"
PAD = "<|pad|>"
ROLES = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
SPECIAL_TOKENS = (BOS, END, PAD, *ROLES.values())

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
MAX_ASSET_BYTES = 6_000_000
"""What the bundled model may weigh, all files together."""


def asset_dir() -> Path:
    """The bundled model's directory, laid out like a Hugging Face checkpoint."""
    return Path(__file__).resolve().parent / "assets" / "model"


def prompt_text(request: str) -> str:
    """A single request, up to where the answer starts."""
    return f"{BOS}{ROLES['user']}{request}{END}{ROLES['assistant']}"
