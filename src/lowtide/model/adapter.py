"""LoRA adapters: settings, initialisation and PEFT's names.

Files are read and written by `lowtide.export.peft`.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowtide.errors import ConfigError
from lowtide.ops.lora_linear import Lora

from .spec import ModelSpec

if TYPE_CHECKING:
    from .decoder import Decoder

ALL_LINEAR = "all-linear"
_PREFIX = "base_model.model.model.layers."


@dataclass(frozen=True)
class LoraConfig:
    """Settings of an adapter, under PEFT's names.

    Attributes:
        r: rank.
        lora_alpha: the adapter's output is scaled by `lora_alpha / r`.
        lora_dropout: probability of dropping an element of the adapter's input in training.
        target_modules: `all-linear`, or module names such as `q_proj` or `self_attn.q_proj`.
        layers_to_transform: blocks to adapt, counted from 0; None adapts all.
    """

    r: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    target_modules: str | Sequence[str] = ALL_LINEAR
    layers_to_transform: Sequence[int] | None = None

    def __post_init__(self) -> None:
        """Refuse values that no adapter can have.

        Raises:
            ConfigError: names the value and the range.
        """
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            raise ConfigError(f"lora r is {self.r!r}; expected a whole number of at least 1.")
        alpha = self.lora_alpha
        if not isinstance(alpha, int | float) or not math.isfinite(alpha) or alpha <= 0:
            raise ConfigError(f"lora_alpha is {alpha!r}; expected a positive number.")
        dropout = self.lora_dropout
        if not isinstance(dropout, int | float) or not 0.0 <= dropout < 1.0:
            raise ConfigError(f"lora_dropout is {dropout!r}; expected 0 <= lora_dropout < 1.")

    @property
    def scale(self) -> float:
        """`lora_alpha / r`."""
        return self.lora_alpha / self.r

    def linears(self, spec: ModelSpec) -> tuple[str, ...]:
        """The targeted projections, in block order.

        Args:
            spec: the model, whose module names these are.

        Returns:
            At least one name.

        Raises:
            ConfigError: a name matches no linear, or there are none.
        """
        names = self.target_modules
        if isinstance(names, str):
            names = [part.strip() for part in names.split(",") if part.strip()]
        if list(names) == [ALL_LINEAR]:
            return spec.linears
        known = {linear.split(".")[-1]: linear for linear in spec.linears}
        known |= {linear: linear for linear in spec.linears}
        unknown = [name for name in names if name not in known]
        if unknown or not names:
            reason = "the output head is frozen in this method" if "lm_head" in unknown else ""
            raise ConfigError(
                f"target_modules {', '.join(map(repr, unknown)) or 'is empty'}: not a linear of "
                f"this model{' (' + reason + ')' if reason else ''}. Choose {ALL_LINEAR!r} or "
                f"names among {', '.join(linear.split('.')[-1] for linear in spec.linears)}."
            )
        chosen = {known[name] for name in names}
        return tuple(linear for linear in spec.linears if linear in chosen)


def parameter_name(layer: int, linear: str, part: str) -> str:
    """PEFT's name of a LoRA matrix; `part` is `A` or `B`."""
    return f"{_PREFIX}{layer}.{linear}.lora_{part}.weight"


def layer_of(name: str) -> int:
    """The block, counted from 0, of a parameter by PEFT's name."""
    return int(name.removeprefix(_PREFIX).split(".", 1)[0])


class Adapter:
    """LoRA matrices of a model: `A (r, in)` and `B (out, r)` per adapted linear."""

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

    @classmethod
    def create(
        cls,
        model: Decoder,
        config: LoraConfig | None = None,
        seed: int = 0,
        dtype: torch.dtype | None = None,
    ) -> Adapter:
        """A fresh adapter as PEFT initialises it: A Kaiming-uniform (a = sqrt 5), B zero.

        Args:
            model: the model it will adapt.
            config: settings; the defaults when None.
            seed: of A's values.
            dtype: of the matrices; None takes the model's compute dtype. In bfloat16 the adapter's
                function is the one with rounded A and B.

        Returns:
            An adapter whose matrices are views of one tensor.

        Raises:
            ConfigError: target_modules names no linear of the model.
        """
        config = config or LoraConfig()
        shapes = adapter_shapes(model.spec, config)
        total = sum(math.prod(shape) for shape in shapes.values())
        flat = torch.zeros(total, dtype=dtype or model.compute_dtype)
        generator = torch.Generator().manual_seed(seed)
        parameters: dict[str, Tensor] = {}
        start = 0
        for name, shape in shapes.items():
            parameters[name] = flat[start : start + math.prod(shape)].view(shape)
            start += math.prod(shape)
            if ".lora_A." in name:
                bound = 1.0 / math.sqrt(shape[1])
                draw = torch.rand(shape, generator=generator, dtype=torch.float32)
                parameters[name].copy_(draw.mul_(2 * bound).sub_(bound))
        return cls(config, parameters, model.compute_dtype)

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
        if dropout_seed is None or self.config.lora_dropout == 0.0:
            return Lora(a, b, self.config.scale)
        place = layer * 1009 + zlib.crc32(linear.encode())
        own = (dropout_seed * 1_000_003 + place) * 0x9E3779B1
        return Lora(a, b, self.config.scale, self.config.lora_dropout, own & (1 << 62) - 1)

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


def adapter_shapes(spec: ModelSpec, config: LoraConfig) -> dict[str, tuple[int, int]]:
    """Shape by PEFT name of every LoRA matrix, in block order.

    Args:
        spec: the model.
        config: rank, targets and layers.

    Returns:
        `(r, in)` of each A, `(out, r)` of each B.

    Raises:
        ConfigError: a targeted linear or layer is not in the model.
    """
    shapes: dict[str, tuple[int, int]] = {}
    layers = config.layers_to_transform
    outside = [layer for layer in layers or () if not 0 <= layer < spec.num_layers]
    if outside or (layers is not None and not layers):
        raise ConfigError(
            f"layers_to_transform is {list(layers or ())}; the model has layers 0 to "
            f"{spec.num_layers - 1}."
        )
    for layer in range(spec.num_layers) if layers is None else sorted(set(layers)):
        for linear in config.linears(spec):
            rows, cols = spec.linear_shape(linear)
            shapes[parameter_name(layer, linear, "A")] = (config.r, cols)
            shapes[parameter_name(layer, linear, "B")] = (rows, config.r)
    return shapes
