"""LoRA adapters: initialisation and PEFT's names.

Files are read and written by `lowtide.export.peft`; settings are those of `lora_config.py`.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowtide.errors import ConfigError
from lowtide.notebook import table
from lowtide.ops.dora import own_scratch, row_norms_
from lowtide.ops.lora_linear import Lora

from .lora_config import ALL_LINEAR as ALL_LINEAR
from .lora_config import LoraConfig as LoraConfig
from .spec import ModelSpec

if TYPE_CHECKING:
    from .decoder import Decoder

_PREFIX = "base_model.model.model.layers."


MATRICES = ("A", "B")
MAGNITUDE = "m"
"""Parts of an adapter on a linear, in the order in which gradients are emitted."""


def parameter_name(layer: int, linear: str, part: str) -> str:
    """PEFT's name of a LoRA matrix in its files; `part` is of MATRICES, or MAGNITUDE."""
    name = "magnitude_vector" if part == MAGNITUDE else f"{part}.weight"
    return f"{_PREFIX}{layer}.{linear}.lora_{name}"


def layer_of(name: str) -> int:
    """The block, counted from 0, of a parameter by PEFT's name."""
    return int(name.removeprefix(_PREFIX).split(".", 1)[0])


class Adapter:
    """LoRA matrices of a model: `A (r, in)` and `B (out, r)` per adapted linear.

    Under DoRA there is `m (out,)`, the length of each row of the adapted weight, as well.
    """

    def __init__(
        self,
        config: LoraConfig,
        parameters: dict[str, Tensor],
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        """Wrap matrices by PEFT name; use `create` or `load`.

        Args:
            config: settings.
            parameters: the matrices, all of one dtype.
            compute_dtype: what they are widened to where they are used; None takes their own.
        """
        self.config = config
        self.parameters = parameters
        own = (p.dtype for p in parameters.values())
        self.compute_dtype = compute_dtype or next(own, torch.float32)

    def _repr_html_(self) -> str:
        count = sum(p.numel() for p in self.parameters.values())
        kind = "DoRA" if self.config.use_dora else "LoRA"
        rows = [("r", str(self.config.r)), ("lora_alpha", f"{self.config.lora_alpha:g}")]
        linears = sorted({module.split(".")[-1] for module in self.modules})
        return table(
            f"a {kind} adapter", [*rows, ("on", ", ".join(linears)), ("parameters", f"{count:,}")]
        )

    @classmethod
    def create(
        cls,
        model: Decoder,
        config: LoraConfig | None = None,
        seed: int = 0,
        dtype: torch.dtype | None = None,
    ) -> Adapter:
        """A fresh adapter as PEFT initialises it: A Kaiming-uniform (a = sqrt 5), B zero.

        Under DoRA m is the length of each row of the weights, which are read for it.

        Args:
            model: the model it will adapt.
            config: settings; the defaults when None.
            seed: of A's values.
            dtype: of the matrices; None takes the model's compute dtype. In bfloat16 the adapter's
                function is the one with rounded A and B.

        Returns:
            An adapter whose matrices are views of one tensor.

        Raises:
            ConfigError: target_modules names no linear of the model, a pattern matches none, or
                DoRA is asked for in bfloat16 or on a weight with a row of zeros.
        """
        config = config or LoraConfig()
        config.check_patterns(model.spec)
        if config.use_dora and dtype == torch.bfloat16:
            raise ConfigError(
                "use_dora with an adapter in bfloat16: magnitudes rounded to 8 bits would change "
                "every row of the weights by up to 0.4%. Keep the adapter in float32."
            )
        adapter = cls.zeros(model, config, dtype)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in adapter.items():
            if ".lora_A." in name:
                bound = 1.0 / math.sqrt(parameter.shape[1])
                draw = torch.rand(parameter.shape, generator=generator, dtype=torch.float32)
                parameter.copy_(draw.mul_(2 * bound).sub_(bound))
        if config.use_dora:
            adapter._measure_rows(model)
        return adapter

    @classmethod
    def zeros(cls, model: Decoder, config: LoraConfig, dtype: torch.dtype | None = None) -> Adapter:
        """An adapter to be filled; all of it is views of one tensor.

        Args:
            model: the model it will adapt.
            config: settings.
            dtype: as in `create`.

        Returns:
            An adapter of zeros.
        """
        shapes = adapter_shapes(model.spec, config)
        sizes = [math.prod(shape) for shape in shapes.values()]
        flat = torch.zeros(sum(sizes), dtype=dtype or model.compute_dtype)
        named = zip(shapes.items(), torch.split(flat, sizes), strict=True)
        parameters = {name: part.view(shape) for (name, shape), part in named}
        return cls(config, parameters, model.compute_dtype)

    def _measure_rows(self, model: Decoder) -> None:
        """Set every m to the lengths of its weight's rows."""
        widest = max(model.spec.linear_shape(name)[1] for name in self.config.linears(model.spec))
        a = torch.zeros(1, widest, dtype=model.compute_dtype)
        scratch = own_scratch(widest, a)
        for layer, linear, _ in self.config.adapted(model.spec):
            weight = model.linears[layer][linear].weight
            rows, columns = weight.shape
            norms, b = a.new_empty(rows), a.new_zeros(rows, 1)
            row_norms_(norms, weight, a[:, :columns], b, 0.0, scratch)
            self.parameters[parameter_name(layer, linear, MAGNITUDE)].copy_(norms)
            if not bool(norms.all()):
                raise ConfigError(
                    f"use_dora divides by the length of each row of a weight, and row "
                    f"{int((norms == 0).nonzero()[0])} of {linear} in block {layer} is zero. Leave "
                    "that linear out with target_modules, or use plain LoRA."
                )

    @classmethod
    def load(cls, directory: str | Path, model: Decoder) -> Adapter:
        """Read a PEFT adapter directory.

        Args:
            directory: holds adapter_config.json and adapter_model.safetensors.
            model: the model it must fit.

        Returns:
            The adapter in the model's compute dtype.

        Raises:
            AdapterError: a file is missing or broken, the kind of adapter is not supported, or it
                does not fit the model; all mismatches are listed.
        """
        from lowtide.export.peft import load_adapter

        return load_adapter(Path(directory), model)

    def save(self, directory: str | Path, base_model: str | None = None) -> None:
        """Write the adapter as PEFT's two files, each replaced atomically.

        Args:
            directory: made if it does not exist.
            base_model: what `base_model_name_or_path` should say.

        Raises:
            OutputError: the directory cannot be written or the disk is too full.
        """
        from lowtide.export.peft import save_adapter

        save_adapter(self, Path(directory), base_model)

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the adapted projections, in block order."""
        found = [name.removeprefix(_PREFIX).split(".", 1)[1] for name in self.parameters]
        return tuple(dict.fromkeys(name.split(".lora_")[0] for name in found))

    @property
    def n_parameters(self) -> int:
        """Trainable parameters."""
        return sum(p.numel() for p in self.parameters.values())

    def lora(self, layer: int, linear: str, dropout_seed: int | None) -> Lora | None:
        """The matrices on one linear, or None where it is not adapted.

        Args:
            layer: 0-based block.
            linear: name of a projection.
            dropout_seed: of this micro-batch; None turns dropout off.

        Returns:
            References to the matrices, or copies where they are not in the compute dtype, with a
            seed of its own for each linear.
        """
        a = self.parameters.get(parameter_name(layer, linear, "A"))
        if a is None:
            return None
        b = self.parameters[parameter_name(layer, linear, "B")]
        a, b = a.to(self.compute_dtype), b.to(self.compute_dtype)
        scale = self.config.scale(layer, linear)
        if dropout_seed is None or self.config.lora_dropout == 0.0:
            return Lora(a, b, scale)
        place = layer * 1009 + zlib.crc32(linear.encode())
        own = (dropout_seed * 1_000_003 + place) * 0x9E3779B1
        return Lora(a, b, scale, self.config.lora_dropout, own & (1 << 62) - 1)

    def magnitude(self, layer: int, linear: str) -> Tensor | None:
        """m `(out,)` of a linear in the compute dtype; None without DoRA, or without an adapter."""
        m = self.parameters.get(parameter_name(layer, linear, MAGNITUDE))
        return None if m is None else m.to(self.compute_dtype)

    def magnitudes(self) -> Iterator[tuple[str, Tensor]]:
        """(PEFT name, m) of every linear under DoRA."""
        return ((name, p) for name, p in self.items() if name.endswith(".lora_magnitude_vector"))

    def of_layer(self, layer: int) -> dict[str, Tensor]:
        """Matrices of one block, by PEFT name."""
        prefix = f"{_PREFIX}{layer}."
        return {name: p for name, p in self.items() if name.startswith(prefix)}

    def leaves(self, layer: int | None = None) -> dict[str, Tensor]:
        """What autograd takes gradients of: matrices in the compute dtype, of one block or all."""
        matrices = self.parameters if layer is None else self.of_layer(layer)
        wide = {name: p.detach().to(self.compute_dtype) for name, p in matrices.items()}
        return {name: p.requires_grad_() for name, p in wide.items()}

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """(PEFT name, matrix) of every parameter."""
        return iter(self.parameters.items())


def adapter_shapes(spec: ModelSpec, config: LoraConfig) -> dict[str, tuple[int, ...]]:
    """Shape by PEFT name of every parameter of an adapter, in block order.

    Args:
        spec: the model.
        config: ranks, targets and layers.

    Returns:
        `(r, in)` of each A, `(out, r)` of each B, `(out,)` of each m.

    Raises:
        ConfigError: a targeted linear or layer is not in the model.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for layer, linear, rank in config.adapted(spec):
        rows, cols = spec.linear_shape(linear)
        shapes[parameter_name(layer, linear, "A")] = (rank, cols)
        shapes[parameter_name(layer, linear, "B")] = (rows, rank)
        if config.use_dora:
            shapes[parameter_name(layer, linear, MAGNITUDE)] = (rows,)
    return shapes
