"""A PEFT model seen as lowtide's: its parameters as frozen weights and an adapter, not copied."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lowtide.errors import ModelError, listed
from lowtide.model.adapter import MAGNITUDE, Adapter, LoraConfig, parameter_name
from lowtide.model.decoder import Decoder
from lowtide.model.families import spec_from_config
from lowtide.model.spec import HEAD, ModelSpec
from lowtide.ops.lora_linear import Lora
from lowtide.weights.base import Weights
from lowtide.weights.checkpoint import dtype_name
from lowtide.weights.matrix import MappedMatrix, StoredMatrix

_LAYERS = "model.layers."


class ModuleWeights(Weights):
    """Tensors of modules by their names in a checkpoint."""

    kind = "modules"
    is_plain = False

    def __init__(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Take the tensors; `name` says whose they are."""
        super().__init__([])
        self.name, self._tensors = name, tensors

    def __getitem__(self, name: str) -> Tensor:
        """See `Weights.__getitem__`."""
        return self._tensors[name]

    def __contains__(self, name: object) -> bool:
        """See `Weights.__contains__`."""
        return name in self._tensors

    def matrix(self, name: str, shape: tuple[int, int], compute_dtype: torch.dtype) -> StoredMatrix:
        """See `Weights.matrix`."""
        return MappedMatrix(self._tensors[name], compute_dtype)

    def stored_as(self, name: str) -> str:
        """See `Weights.stored_as`."""
        return dtype_name(self._tensors[name].dtype)

    def stored_bytes(self, name: str) -> int:
        """See `Weights.stored_bytes`."""
        return self._tensors[name].nbytes

    def check(self, expected: Mapping[str, tuple[int, ...]], optional: Iterable[str] = ()) -> None:
        """See `Weights.check`; any floating dtype will do."""
        known = set(expected) | set(optional)
        problems = [
            f"missing: {name} {list(expected[name])}" for name in expected if name not in self
        ]
        for name, tensor in self._tensors.items():
            if name not in known:
                problems.append(f"more than lowtide's block has: {name} {list(tensor.shape)}")
            elif name in expected and tuple(tensor.shape) != expected[name]:
                problems.append(
                    f"another shape: {name} is {list(tensor.shape)}, the config says "
                    f"{list(expected[name])}"
                )
        if problems:
            raise ModelError(
                f"the modules of {self.name} do not fit its config:\n{listed(problems)}\n"
                "Pass the text model as transformers makes it from its config, on one device."
            )


class Target(NamedTuple):
    """One adapted linear: PEFT's module and the names of its parts."""

    module: Any
    layer: int
    linear: str


class ModuleAdapter(Adapter):
    """PEFT's modules as an adapter: matrices, scales and dropout are read from them."""

    def __init__(self, targets: Iterable[Target], name: str, dtype: torch.dtype) -> None:
        """Take the modules' parameters.

        Args:
            targets: the adapted linears.
            name: PEFT's name of the active adapter.
            dtype: what matrices are widened to.
        """
        self._modules: dict[tuple[int, str], Any] = {}
        self.trained: dict[str, nn.Parameter] = {}
        self._name = name
        for module, layer, linear in targets:
            if name in module.lora_A:
                self._modules[layer, linear] = module
                for part, parameter in _parts(module, name).items():
                    self.trained[parameter_name(layer, linear, part)] = parameter
        matrices = {key: parameter.detach() for key, parameter in self.trained.items()}
        super().__init__(LoraConfig(), matrices, dtype)

    def lora(self, layer: int, linear: str, dropout_seed: int | None) -> Lora | None:
        """See `Adapter.lora`."""
        found = super().lora(layer, linear, None)
        if found is None:
            return None
        module = self._modules[layer, linear]
        p = self._rate(module)
        found = found._replace(scale=float(module.scaling[self._name]))
        if dropout_seed is None or p == 0.0:
            return found
        place = layer * 1009 + zlib.crc32(linear.encode())
        own = (dropout_seed * 1_000_003 + place) * 0x9E3779B1
        return found._replace(dropout=p, seed=own & (1 << 62) - 1)

    @property
    def drops(self) -> bool:
        """Whether any linear has dropout."""
        return any(self._rate(module) > 0.0 for module in self._modules.values())

    def _rate(self, module: Any) -> float:
        return float(getattr(module.lora_dropout[self._name], "p", 0.0))

    def names_in(self, layer: int) -> list[str]:
        """Names of one block's parameters, in order."""
        return list(self.of_layer(layer))


def _parts(module: Any, name: str) -> dict[str, nn.Parameter]:
    found = {"A": module.lora_A[name].weight, "B": module.lora_B[name].weight}
    if name in module.lora_magnitude_vector:
        found[MAGNITUDE] = module.lora_magnitude_vector[name].weight
    return found


class Inner(NamedTuple):
    """What lowtide computes with.

    Attributes:
        decoder: the frozen weights.
        adapter: the active adapter; None where adapters are switched off.
        device: of all of it.
    """

    decoder: Decoder
    adapter: ModuleAdapter | None
    device: torch.device


def targets_of(causal_lm: nn.Module) -> list[Target]:
    """The adapted linears of a causal LM under PEFT, in order."""
    from peft.tuners.lora import LoraLayer

    found = []
    for name, module in causal_lm.named_modules():
        if isinstance(module, LoraLayer) and name.startswith(_LAYERS):
            layer, _, linear = name.removeprefix(_LAYERS).partition(".")
            found.append(Target(module, int(layer), linear))
    return found


def frozen_tensors(causal_lm: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that are not an adapter's, under the names that a checkpoint has."""
    found = {}
    for name, parameter in causal_lm.named_parameters(remove_duplicate=False):
        if ".lora_" not in name:
            found[name.replace(".base_layer.", ".")] = parameter
    return found


def spec_of(causal_lm: Any) -> ModelSpec:
    """The spec, from the config.

    Args:
        causal_lm: transformers' model.

    Returns:
        The spec.

    Raises:
        ModelError: the family is not supported, or a field that changes the function is not.
    """
    return spec_from_config(causal_lm.config.to_dict())


def read_inner(model: Any, spec: ModelSpec) -> Inner:
    """The model as it is now: references only, so that whatever moved or changed is seen.

    Args:
        model: a PEFT model.
        spec: of its base.

    Returns:
        Weights and adapter.

    Raises:
        ModelError: the modules do not fit the spec.
    """
    causal_lm = model.get_base_model()
    tensors = {name: parameter.detach() for name, parameter in frozen_tensors(causal_lm).items()}
    if spec.tied_head:
        tensors.pop(HEAD, None)
    wide = any(tensor.dtype == torch.float64 for tensor in tensors.values())
    dtype = torch.float64 if wide else torch.float32
    weights = ModuleWeights(type(causal_lm).__name__, tensors)
    decoder = Decoder(spec, weights, dtype, "the model's weights", Path(weights.name))
    targets = targets_of(causal_lm)
    adapter = None
    if not any(target.module.disable_adapters for target in targets):
        adapter = ModuleAdapter(targets, model.active_adapter, dtype)
    return Inner(decoder, adapter, decoder.final_norm.device)
