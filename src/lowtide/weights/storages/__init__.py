"""The registries of quantised storages, by name: those that are read, and those that are made.

A new storage is one file here, with a class as in `base.Storage`, and one line: in STORAGES where
`--quantize` makes it, in BLOCKS where GGUF files hold it.
"""

from __future__ import annotations

from .base import Quantizer, Storage
from .ggml import Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, BlockStorage
from .ggml_k import Q4_K, Q5_K, Q6_K
from .int4 import Int4
from .int8 import Int8

STORAGES: dict[str, Quantizer] = {
    storage.name: storage
    for storage in (
        Int8("int8"),
        Int4("int4", group_size=32),
        Int4("int4-g64", group_size=64),
        Int4("int4-asym", group_size=32, symmetric=False),
        Int4("int4-asym-g64", group_size=64, symmetric=False),
    )
}
"""What `--quantize` takes."""
BLOCKS: dict[str, BlockStorage] = {
    storage.name: storage
    for storage in (Q8_0(), Q4_0(), Q4_1(), Q5_0(), Q5_1(), Q4_K(), Q5_K(), Q6_K())
}
"""What GGUF files hold, beside floating numbers."""
READ: dict[str, Storage] = {**STORAGES, **BLOCKS}
"""All that matrices are unpacked from."""
