"""Write a model as one GGUF file: F32, F16, BF16 or Q8_0, as llama.cpp's own converter would.

Tensors come one by one, by name, and are converted some rows at a time; nothing of a tensor's size
is made beside it. The file has its name when it is whole and on the disk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lowtide.errors import ConfigError, ModelError
from lowtide.model.gguf.tensors import GgufTensor, row_order
from lowtide.model.gguf.write import GgufModel, gguf_model
from lowtide.weights.whole import check_free_space
from lowtide.weights.writer import write_atomically

if TYPE_CHECKING:
    import gguf
    from gguf import GGMLQuantizationType


class Rows(Protocol):
    """A matrix whose rows are made when they are asked for."""

    @property
    def shape(self) -> tuple[int, ...]:
        """`(out, in)`."""

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        """Some of its rows, in any floating dtype, on the CPU."""


TensorByName = Callable[[str], Tensor | Rows]
"""Gives a tensor by its Hugging Face name, in any floating dtype, on the CPU."""
GGUF_DTYPES = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7}
"""What matrices may be stored as, and llama.cpp's number of such a file. Vectors stay F32."""
_ALIGNMENT = 32
_TILE_NUMBERS = 1 << 20


class Written(NamedTuple):
    """What a file holds.

    Attributes:
        path: the file.
        nbytes: its size.
        kept_f16: matrices that are F16 in a Q8_0 file, since their rows do not divide into blocks.
    """

    path: Path
    nbytes: int
    kept_f16: tuple[str, ...]


class Place(NamedTuple):
    """A tensor on its way into the file."""

    there: GgufTensor
    kind: GGMLQuantizationType
    load: Callable[[], Tensor | Rows]

    @property
    def nbytes(self) -> int:
        """In the file, without what fills it up to the next tensor."""
        from gguf import GGML_QUANT_SIZES

        block, size = GGML_QUANT_SIZES[self.kind]
        return math.prod(self.there.shape) // block * size


def write_gguf(
    path: Path,
    config: Mapping[str, Any],
    tensor: TensorByName,
    dtype: str,
    tokenizer: Mapping[str, Any],
) -> Written:
    """Write a model as a GGUF file, durably and in one piece.

    Args:
        path: the file; whatever it held stays until the new content is complete.
        config: a parsed config.json.
        tensor: called once for every tensor of the model, in the file's order.
        dtype: a key of GGUF_DTYPES.
        tokenizer: the metadata of its tokenizer, from `tokenizer_metadata`; may be empty.

    Returns:
        What was written.

    Raises:
        ConfigError: the dtype is not known.
        ModelError: llama.cpp cannot express the model, which is known before anything is written;
            or a number is not finite in the dtype.
        OutputError: the disk is full or the directory cannot be written; nothing is left behind.
    """
    if dtype not in GGUF_DTYPES:
        raise ConfigError(
            f"dtype {dtype!r} of a GGUF file is not one that lowtide writes; choose one of "
            f"{', '.join(GGUF_DTYPES)}."
        )
    model = gguf_model(config)
    places = _places(model, tensor, dtype)
    metadata = _all_metadata(model, tokenizer, dtype)
    nbytes = write_file(path, model.architecture, metadata, places)
    kept = [p.there.name for p in places if p.kind.name == "F16" and dtype == "q8_0"]
    return Written(path, nbytes, tuple(kept))


def write_file(
    path: Path, architecture: str, metadata: Mapping[str, Any], places: Sequence[Place]
) -> int:
    """Write a GGUF file of any kind, durably and in one piece.

    Args:
        path: the file; whatever it held stays until the new content is complete.
        architecture: `general.architecture`.
        metadata: by full keys; whole numbers are uint32 in the file, others float32.
        places: its tensors, in order.

    Returns:
        Its size.

    Raises:
        ModelError: a number is not finite in what it is stored as.
        OutputError: the disk has no room or the directory cannot be written; nothing is left
            behind.
    """
    check_free_space(path, sum(place.nbytes for place in places))
    nbytes = 0

    def counted() -> Iterator[bytes | memoryview]:
        nonlocal nbytes
        for part in _parts(architecture, metadata, places):
            nbytes += part.nbytes if isinstance(part, memoryview) else len(part)
            yield part

    write_atomically(path, counted())
    return nbytes


def _all_metadata(model: GgufModel, tokenizer: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """What the file says of itself, its model and its tokenizer."""
    from gguf import GGML_QUANT_VERSION

    return {
        **model.metadata,
        "general.type": "model",
        "general.file_type": GGUF_DTYPES[dtype],
        "general.quantization_version": GGML_QUANT_VERSION,
        **(tokenizer or {"tokenizer.ggml.model": "none"}),
    }


def _places(model: GgufModel, tensor: TensorByName, dtype: str) -> list[Place]:
    """Every tensor of the file, in its order, and as what it is stored."""
    from gguf import GGMLQuantizationType

    places = []
    for name, vector in model.vectors.items():
        there = GgufTensor(name, tuple(vector.shape))
        places.append(Place(there, GGMLQuantizationType.F32, partial(_same, vector)))
    for name, there in model.tensors.items():
        kind = GGMLQuantizationType[dtype.upper()]
        if len(there.shape) == 1:
            kind = GGMLQuantizationType.F32
        elif kind.name == "Q8_0" and there.shape[1] % _ALIGNMENT:
            kind = GGMLQuantizationType.F16
        places.append(Place(there, kind, partial(tensor, name)))
    return places


def _same(vector: Tensor) -> Tensor:
    return vector


def _parts(
    architecture: str, metadata: Mapping[str, Any], places: Sequence[Place]
) -> Iterator[bytes | memoryview]:
    """The content of the file, in order."""
    yield _padded(_header(architecture, metadata, places))
    for place in places:
        length = 0
        for piece in _pieces(place):
            length += piece.nbytes
            yield piece
        yield bytes(-length % _ALIGNMENT)


def _padded(header: bytes) -> bytes:
    return header + bytes(-len(header) % _ALIGNMENT)


def _header(architecture: str, metadata: Mapping[str, Any], places: Sequence[Place]) -> bytes:
    """What stands before the tensors, as the package writes it."""
    import gguf
    import numpy as np

    with TemporaryDirectory() as scratch:
        path = Path(scratch) / "header.gguf"
        writer = gguf.GGUFWriter(path, architecture)
        for key, value in metadata.items():
            if key != "general.architecture":  # which the package has written itself
                _add(writer, key, value)
        for place in places:
            writer.add_tensor_info(
                place.there.name,
                place.there.shape,
                np.dtype(np.float32),
                place.nbytes,
                raw_dtype=place.kind,
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        return path.read_bytes()


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """A key with the type that llama.cpp expects of such a value."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _pieces(place: Place) -> Iterator[memoryview]:
    """The bytes of a tensor, some rows at a time."""
    from gguf.quants import quantize

    there, source = place.there, place.load()
    if tuple(source.shape) != there.shape:
        raise ModelError(
            f"the tensor for {there.name} has shape {list(source.shape)} and config.json asks for "
            f"{list(there.shape)}. Nothing was written."
        )
    rows = source
    if isinstance(source, Tensor) and source.dim() == 1 and not there.heads:
        rows = source.unsqueeze(0)
    order = row_order(rows.shape[0], there.heads).argsort() if there.heads else None
    step = max(1, _TILE_NUMBERS // math.prod(rows.shape[1:]))
    for start in range(0, rows.shape[0], step):
        tile = rows[start : start + step] if order is None else rows[order[start : start + step]]
        numbers = tile.detach().float()
        if there.offset:
            numbers = numbers + there.offset
        limit = torch.finfo(torch.float16 if place.kind.name == "F16" else torch.float32).max
        if not bool((numbers.abs() <= limit).all()):
            raise ModelError(
                f"the tensor for {there.name} holds a number that is not finite in "
                f"{place.kind.name} (above {limit:g} or not a number). Nothing was written; "
                "choose bf16 or f32 if the model's own weights are good."
            )
        yield quantize(numbers.contiguous().numpy(), place.kind).data.cast("B")
