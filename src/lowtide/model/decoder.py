"""A loaded decoder: its spec, its mapped weights, and blocks assembled with an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lowtide.errors import ConfigError, DataError
from lowtide.ops.attention import Segment, self_segments
from lowtide.ops.dora import Magnitude
from lowtide.ops.glu import Glu
from lowtide.ops.lora_linear import Linear, Lora
from lowtide.weights.base import Weights
from lowtide.weights.checkpoint import Checkpoint, dtype_name
from lowtide.weights.gguf.file import is_gguf
from lowtide.weights.matrix import StoredMatrix
from lowtide.weights.residency import Residency

from .adapter import MAGNITUDE, Adapter, parameter_name
from .block import Block, Norms, Positions
from .families import read_config, spec_from_config
from .gguf.home import open_gguf
from .hub import resolve_model
from .projections import by_role
from .quantized import cached_checkpoint, refuse_quantizing
from .resident import limit_resident
from .rope import rope_tables
from .row_norms import RowNorms
from .spec import EMBEDDING, FINAL_NORM, HEAD, QK_NORMS, ModelSpec

COMPUTE_DTYPES = {"float32": torch.float32, "float64": torch.float64}


class FrozenLinear(NamedTuple):
    """A linear of the checkpoint: mapped weight, and its bias in the compute dtype."""

    weight: StoredMatrix
    bias: Tensor | None


class Decoder:
    """A frozen model on mapped weights. Norm weights and biases, which are tiny, are widened."""

    def __init__(
        self,
        spec: ModelSpec,
        checkpoint: Weights,
        dtype: torch.dtype,
        dtype_reason: str,
        directory: Path,
        *,
        path: Path | None = None,
    ) -> None:
        """Check the weights against the spec and wrap them; use `load_model`.

        `directory` has config.json and the tokenizer's files; `checkpoint` may lie elsewhere.
        `path` is the model as the user gave it, where that is not the directory.
        """
        optional = [HEAD] if spec.tied_head else []
        checkpoint.check(spec.tensor_shapes(), optional)
        self.spec = spec
        self.checkpoint = checkpoint
        self.directory = directory
        self.path = directory if path is None else path
        self.compute_dtype = dtype
        self.dtype_reason = dtype_reason
        table = (spec.vocab_size, spec.hidden_size)
        self.embedding = checkpoint.matrix(EMBEDDING, table, dtype)
        self.head = checkpoint.matrix(EMBEDDING if spec.tied_head else HEAD, table, dtype)
        self.residency: Residency | None = None
        self.resident_weights: int | str | None = None
        self.final_norm = self._norm(FINAL_NORM)
        self.linears: list[dict[str, FrozenLinear]] = []
        self.norms: list[Norms] = []
        for layer in range(spec.num_layers):
            prefix = f"model.layers.{layer}."
            self.linears.append({name: self._linear(prefix + name, name) for name in spec.linears})
            on_qk = QK_NORMS if spec.qk_norm else (None, None)
            self.norms.append(
                Norms(
                    *(
                        None if name is None else self._norm(f"{prefix}{name}.weight")
                        for name in (*spec.norms, *on_qk)
                    )
                )
            )

    @property
    def matrices(self) -> list[StoredMatrix]:
        """All matrices, an embedding that is also the head twice."""
        linears = [one.weight for linears in self.linears for one in linears.values()]
        return [self.embedding, *linears, self.head]

    @property
    def widens(self) -> bool:
        """Whether tiles are converted into the caller's buffer, and not views of the file."""
        return any(matrix.widens for matrix in self.matrices)

    @property
    def reorders(self) -> bool:
        """Whether rows of some matrices lie in another order in the file."""
        return any(matrix.reordered for matrix in self.matrices)

    @property
    def storages(self) -> tuple[str, ...]:
        """What matrices are unpacked from, by name."""
        found = {one.storage.name for one in self.matrices if one.storage is not None}
        return tuple(sorted(found))

    @property
    def stored_dtypes(self) -> list[str]:
        """Dtypes and quantised storages found in the files, by name."""
        return sorted({self.checkpoint.stored_as(name) for name in self.spec.tensor_shapes()})

    def in_dtype(self, dtype: torch.dtype) -> Decoder:
        """The same model, on the same mapped weights, computing in another dtype."""
        reason, at = self.dtype_reason, self.path
        other = Decoder(self.spec, self.checkpoint, dtype, reason, self.directory, path=at)
        other.resident_weights = self.resident_weights
        other.residency = limit_resident(other, self.resident_weights)
        return other

    def _norm(self, name: str) -> Tensor:
        """A norm's weight in the compute dtype, with the model's offset already added."""
        weight = self.checkpoint[name].to(self.compute_dtype)
        return weight + self.spec.norm_offset if self.spec.norm_offset else weight

    def _linear(self, prefix: str, name: str) -> FrozenLinear:
        shape = self.spec.linear_shape(name)
        weight = self.checkpoint.matrix(prefix + ".weight", shape, self.compute_dtype)
        if name not in self.spec.biased:
            return FrozenLinear(weight, None)
        return FrozenLinear(weight, self.checkpoint[prefix + ".bias"].to(self.compute_dtype))

    def block(
        self,
        layer: int,
        adapter: Adapter | None,
        dropout_seed: int | None,
        norms: RowNorms | None = None,
    ) -> Block:
        """Weights of block `layer` with the adapter's matrices on them.

        Args:
            layer: 0-based.
            adapter: LoRA matrices, or None for the base model.
            dropout_seed: this micro-batch's seed for LoRA dropout; None turns dropout off.
            norms: for DoRA; what it has not formed yet is formed, which reads the weights. None
                without DoRA.

        Returns:
            References only; nothing is copied.
        """
        spec = self.spec
        linears: dict[str, Linear] = {}
        for name, frozen in self.linears[layer].items():
            lora: Lora | None = None
            if adapter is not None:
                lora = adapter.lora(layer, name, dropout_seed)
                m = adapter.magnitude(layer, name)
                if lora is not None and m is not None:
                    assert norms is not None
                    norm = norms.of(parameter_name(layer, name, MAGNITUDE), frozen.weight, lora)
                    lora = lora._replace(magnitude=Magnitude(m, norm))
            linears[name] = Linear(frozen.weight, frozen.bias, lora)
        of = by_role(spec, linears)
        return Block(
            norms=self.norms[layer],
            q=of["q"],
            k=of["k"],
            v=of["v"],
            o=of["o"],
            glu=Glu(of["gate"], of["up"], of["down"], spec.activation),
            projections=spec.projections,
            heads=spec.heads(layer),
            rope=spec.layers[layer].rope,
            eps=spec.rms_norm_eps,
            scale=spec.residual_scale,
        )

    def positions(self, lengths: Sequence[int]) -> Positions:
        """Segments and rotary tables of sequences laid end to end.

        Args:
            lengths: tokens of each sequence.

        Returns:
            Tables of `2 T rotated / 2` elements each.
        """
        places = torch.cat([torch.arange(length, device="cpu") for length in lengths])
        own = torch.cat([torch.full((length,), length, device="cpu") for length in lengths])
        return self.positions_at(places, self_segments(lengths), own)

    def positions_at(
        self, places: Tensor, segments: Sequence[Segment], lengths: Tensor
    ) -> Positions:
        """Rotary tables at given positions `(T,)` of sequences of so many tokens `(T,)`."""
        spec = self.spec
        return Positions(
            segments,
            [
                rope_tables(rope, spec.head_dim, places, self.compute_dtype, lengths)
                for rope in spec.ropes
            ],
        )

    def changes_between(self, before: int, after: int) -> bool:
        """Whether the angles of a sequence change when it grows from `before` to `after` tokens."""
        limits = [r.original_max_positions for r in self.spec.ropes if r.depends_on_length]
        return any(before <= limit < after for limit in limits)

    def check_sequences(self, lengths: Sequence[int], largest_id: int) -> None:
        """Refuse what the model has no positions or no embedding for.

        Args:
            lengths: tokens of each sequence.
            largest_id: the largest id among tokens and labels.

        Raises:
            DataError: a sequence is too long, or a token id is not in the vocabulary.
        """
        if max(lengths) > self.spec.max_positions:
            raise DataError(
                f"a sequence has {max(lengths)} tokens, and the model has positions for "
                f"{self.spec.max_positions} (max_position_embeddings in config.json). Lower "
                "--max-seq-length, or cut the sequence."
            )
        if largest_id >= self.spec.vocab_size:
            raise DataError(
                f"token id {largest_id} is outside the model's vocabulary of "
                f"{self.spec.vocab_size}; the tokenizer belongs to another model. Pass the right "
                "one with --tokenizer."
            )


def choose_compute_dtype(requested: str | None) -> tuple[torch.dtype, str]:
    """The dtype of activations and products, and why.

    Args:
        requested: a key of COMPUTE_DTYPES, or None to choose.

    Returns:
        The dtype, and a sentence for `lowtide info`.

    Raises:
        ConfigError: the name is not one of COMPUTE_DTYPES.
    """
    if requested is None:
        return torch.float32, (
            "float32: gradients are exact to rounding, and most CPUs multiply float32 at full "
            "speed but bfloat16 several times slower; 16-bit weights stay 16-bit in the file and "
            "are widened tile by tile"
        )
    if requested not in COMPUTE_DTYPES:
        raise ConfigError(
            f"compute dtype {requested!r} is not supported; choose one of "
            f"{', '.join(COMPUTE_DTYPES)}."
        )
    return COMPUTE_DTYPES[requested], f"{requested}: asked for"


def load_model(
    model: str | Path,
    compute_dtype: str | torch.dtype | None = None,
    quantize: str | None = None,
    resident_weights: int | str | None = None,
) -> Decoder:
    """Open a model for training or generation, on mapped weights.

    Args:
        model: a local Hugging Face directory, one that `lowtide quantize` wrote, a GGUF file, or a
            hub id such as `Qwen/Qwen2.5-0.5B`.
        compute_dtype: `float32` or `float64`, by name or as a torch dtype; None chooses and
            keeps the reason in `dtype_reason`.
        quantize: a name of `weights.storages.STORAGES`, such as `int4`: the weights are quantised
            into a cache once, and opened from there. None takes them as they are stored.
        resident_weights: how much of the mapped weights may be in memory at once, in bytes or as
            text such as `400MB`; None sets a limit only where the machine, or the process's
            control group, has no room for all of them.

    Returns:
        The decoder. Weights are not read until they are used.

    Raises:
        ModelError: the model cannot be found, read, or is of a kind that is not supported.
        ConfigError: the compute dtype or the storage is not supported, or the limit is too small
            for the model.
        OutputError: the cache cannot be written.
    """
    if isinstance(compute_dtype, torch.dtype):
        compute_dtype = dtype_name(compute_dtype)
    dtype, reason = choose_compute_dtype(compute_dtype)
    path = resolve_model(str(model))
    checkpoint: Weights
    if is_gguf(path):
        refuse_quantizing(path, quantize)
        directory, checkpoint = open_gguf(path)
        spec = spec_from_config(read_config(directory))
    else:
        directory, spec = path, spec_from_config(read_config(path))
        checkpoint = (
            Checkpoint.open(path) if quantize is None else cached_checkpoint(path, quantize)
        )
    decoder = Decoder(spec, checkpoint, dtype, reason, directory, path=path)
    decoder.resident_weights = resident_weights
    decoder.residency = limit_resident(decoder, resident_weights)
    return decoder
