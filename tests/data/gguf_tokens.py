"""What llama.cpp makes of awkward texts with tokenizers that lowtide wrote into GGUF files.

    python tests/data/gguf_tokens.py

writes `golden/llama_cpp_tokens.json` anew: for each kind of tokenizer the digest of its metadata,
and a digest of the ids of every awkward text. It needs llama-cpp-python.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from family_tokenizers import families
from test_family_tokenizers import AWKWARD

from lowtide.export.gguf_model import write_gguf
from lowtide.export.gguf_tokenizer import tokenizer_metadata

GOLDEN = Path(__file__).parent / "golden" / "llama_cpp_tokens.json"
PADDING = 7
"""Rows that a model has beyond its tokenizer's tokens."""
KINDS = dict(families())


def metadata_of(name: str, scratch: Path) -> dict[str, Any]:
    """Of the tokenizer of a kind, as a GGUF file says it."""
    family = KINDS[name]
    directory = family.write(scratch / name)
    size = family.tokenizer.get_vocab_size(with_added_tokens=True)
    return tokenizer_metadata(directory, size + PADDING)


def digest(metadata: dict[str, Any]) -> str:
    """Of all keys and values."""
    return hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()


def llama_cpp_ids(metadata: dict[str, Any], path: Path) -> list[list[int]]:
    """The ids of every awkward text, with BOS where the file says so."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "export"))
    import llama_cpp
    from gguf_models import tiny, weights

    rows = len(metadata["tokenizer.ggml.tokens"])
    config = tiny(model_type="llama", vocab_size=rows, num_attention_heads=3, head_dim=10)
    write_gguf(path, config, weights(config).__getitem__, "f16", metadata)
    model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    try:
        return [model.tokenize(text.encode(), add_bos=True, special=True) for text in AWKWARD]
    finally:
        model.close()


def main() -> None:
    """Write the golden file."""
    lines = []
    with TemporaryDirectory() as name:
        scratch = Path(name)
        for kind in KINDS:
            metadata = metadata_of(kind, scratch)
            ids = llama_cpp_ids(metadata, scratch / f"{kind}.gguf")
            hashed = [digest_of_ids(one) for one in ids]
            lines.append(f"{json.dumps(kind)}: {json.dumps([digest(metadata), *hashed])}")
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def digest_of_ids(ids: list[int]) -> str:
    """Short: there are hundreds of lists of up to thousands."""
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16]


if __name__ == "__main__":
    main()
