"""The check itself: exact methods held to a truth, others compared with it.

Bounds, on the error of each parameter (`compare`):

- float64 against float64: 1e-9. Rounding leaves 1e-12 or less; a wrong formula leaves far more.
- float32: twice what autograd's rounding can do to this model on this data. The error of one
  parameter is a draw of luck: where a model is sensitive, one early rounding moves all later
  gradients together, and two correct programs differ by any factor. So autograd's error is drawn
  five times, four of them with every norm's weights off by one rounding (epsilon) at random, and
  8 times the largest is taken for what it can do: were errors normal, a sixth draw would be over
  that once in 30,000 times. Beside it, 16 epsilons for the few sums of a method's own, and one
  epsilon of the whole gradient: a gradient that is small because large terms cancel (an attention
  head that has made up its mind) carries the rounding of those terms.
- float32 against float32 autograd: the same, with the draws' distances from autograd.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowtide.methods import METHODS, MethodOptions, get_method, gradients
from lowtide.model.adapter import Adapter, LoraConfig
from lowtide.model.batch import Batch
from lowtide.model.block import Norms
from lowtide.model.decoder import Decoder
from lowtide.weights.checkpoint import dtype_name

from .compare import Comparison, compare, cosine, measured_against, relative_errors
from .fits import Truth, choose_truth

FLOAT64_BOUND = 1e-9
DRAWS, FLOAT32_FACTOR, FLOAT32_EPS = 5, 2 * 8, 16
_EPS32 = torch.finfo(torch.float32).eps

Grads = Mapping[str, Tensor]


@dataclass
class CheckResult:
    """What a check found.

    Attributes:
        truth: what was held against.
        loss: of the batch, in nats per labelled token.
        exact: comparisons of each exact method; the first of a precision is with the truth.
        inexact: cosine of each other method with the truth.
    """

    truth: Truth
    loss: float
    exact: dict[str, list[Comparison]] = field(default_factory=dict)
    inexact: dict[str, float] = field(default_factory=dict)

    @property
    def against_truth(self) -> list[Comparison]:
        """The exact methods' comparisons with the truth, in every precision."""
        every = [one for comparisons in self.exact.values() for one in comparisons]
        return [one for one in every if one.against == self.truth.name]

    @property
    def passed(self) -> bool:
        """Whether no bound is exceeded."""
        return all(one.passed for comparisons in self.exact.values() for one in comparisons)


@dataclass
class _Reference:
    """Gradients that others in a precision are held to, and the bound of each parameter."""

    name: str
    grads: Grads
    bounds: dict[str, float]


@dataclass
class _Subject:
    """The model, adapter and batch, in the precision asked for and in others."""

    model: Decoder
    adapter: Adapter
    batch: Batch
    seed: int

    def gradients(
        self, method: str, options: MethodOptions | None = None, model: Decoder | None = None
    ) -> Grads:
        """By a fresh instance, whose buffers are gone afterwards."""
        return self.result(method, options, model)[1]

    def result(
        self, method: str, options: MethodOptions | None = None, model: Decoder | None = None
    ) -> tuple[float, Grads]:
        """The loss and the gradients."""
        done = gradients(
            model or self.model, self.adapter, self.batch, get_method(method, options),
            dropout_seed=self.seed, seed=self.seed,
        )  # fmt: skip
        return done.loss, done.grads

    def at(self, dtype: torch.dtype) -> _Subject:
        """The same in another precision; the weights are the same mapped file."""
        if dtype == self.model.compute_dtype:
            return self
        moved = {name: p.to(dtype) for name, p in self.adapter.items()}
        model = self.model.in_dtype(dtype)
        return _Subject(model, Adapter(self.adapter.config, moved), self.batch, self.seed)


def filled_adapter(model: Decoder, config: LoraConfig, seed: int) -> Adapter:
    """A fresh adapter whose B is small and random: with B zero no gradient would reach A.

    Args:
        model: the model it will adapt.
        config: rank and targets.
        seed: of A and of B.

    Returns:
        The adapter; its values are exact in float32.
    """
    adapter = Adapter.create(model, config, seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapter.items():
        if ".lora_B." in name:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter.copy_(noise.mul_(0.02))
    return adapter


def check_gradients(
    model: Decoder,
    adapter: Adapter,
    batch: Batch,
    *,
    available: int,
    seed: int = 0,
    said: Callable[[str], None] = lambda text: None,
) -> CheckResult:
    """Hold every method's gradients to the best truth that fits in memory.

    Args:
        model: in the precision that training would take.
        adapter: LoRA matrices; where B is zero, no gradient of A is tested.
        batch: sequences and labels.
        available: bytes of memory that may be taken.
        seed: of dropout and of what methods draw.
        said: told of each step, before it is made.

    Returns:
        Comparisons by method.

    Raises:
        ConfigError: no truth fits in memory.
        DataError: no position carries a label, or a sequence does not fit the model.
        TrainingError: the loss is not finite.
    """
    truth = choose_truth(model, adapter, batch, available)
    subject = _Subject(model, adapter, batch, seed)
    said(f"{truth.name}: the truth")
    loss, grads = subject.at(truth.dtype).result(truth.method, truth.options)
    result = CheckResult(truth, loss)
    methods = [name for name in METHODS if name != truth.method and name != "autograd"]
    exact = [name for name in methods if get_method(name).exact]
    if truth.dtype == torch.float64:
        bounds = dict.fromkeys(grads, FLOAT64_BOUND)
        reference = _Reference(truth.name, grads, bounds)
        _hold(result, exact, subject.at(torch.float64), [reference], said)
    if model.compute_dtype == torch.float32:
        references = _float32_references(subject, truth, grads, said)
        _hold(result, exact, subject, references, said)
    for name in methods:
        if name not in exact:
            said(f"{name}: its cosine with the truth")
            result.inexact[name] = cosine(subject.gradients(name), grads)
    return result


def _hold(
    result: CheckResult,
    methods: list[str],
    subject: _Subject,
    references: list[_Reference],
    said: Callable[[str], None],
) -> None:
    """Compare each method, in the subject's precision, with each reference."""
    precision = dtype_name(subject.model.compute_dtype)
    for method in methods:
        said(f"{method} in {precision}")
        ours = subject.gradients(method)
        result.exact.setdefault(method, []).extend(
            compare(ours, one.grads, one.bounds, precision=precision, against=one.name)
            for one in references
        )


def _float32_references(
    subject: _Subject, truth: Truth, grads: Grads, said: Callable[[str], None]
) -> list[_Reference]:
    """The truth, and the truth's method in float32 where that is another, with bounds."""
    own_name = Truth(truth.method, torch.float32, 0, truth.options).name
    said(f"{own_name}: how far rounding takes it, {DRAWS} times")
    references = [_Reference(truth.name, grads, dict.fromkeys(grads, 0.0))]
    if truth.dtype != torch.float32:
        own = subject.gradients(truth.method, truth.options)
        references[0].bounds = relative_errors(own, grads)
        references.append(_Reference(own_name, own, dict.fromkeys(grads, 0.0)))
    for draw in range(1, DRAWS):
        model = shaken(subject.model, subject.seed + draw)
        drawn = subject.gradients(truth.method, truth.options, model)
        for reference in references:
            for name, error in relative_errors(drawn, reference.grads).items():
                reference.bounds[name] = max(reference.bounds[name], error)
    for reference in references:
        sizes = measured_against(reference.grads)
        whole = math.hypot(*(float(grad.double().norm()) for grad in reference.grads.values()))
        for name, error in reference.bounds.items():
            epsilons = FLOAT32_EPS + (whole / sizes[name] if whole else 0.0)
            reference.bounds[name] = FLOAT32_FACTOR * error + epsilons * _EPS32
    return references


def shaken(model: Decoder, seed: int) -> Decoder:
    """The model with every norm weight off by one rounding, up or down at random.

    Args:
        model: left as it is.
        seed: of the signs.

    Returns:
        A model on the same mapped weights.
    """
    generator = torch.Generator().manual_seed(seed)

    def shake(weight: Tensor) -> Tensor:
        signs = torch.randint(0, 2, weight.shape, generator=generator).to(weight.dtype) * 2 - 1
        return weight * (1 + signs * torch.finfo(weight.dtype).eps)

    moved = copy.copy(model)
    moved.final_norm = shake(model.final_norm)
    moved.norms = [
        Norms(*(None if weight is None else shake(weight) for weight in norms))
        for norms in model.norms
    ]
    return moved


def expected_cosine(directions: int, n_parameters: int) -> float:
    """What theory gives for the cosine of a mean of SPSA estimates with the exact gradient.

    Args:
        directions: normal directions that the mean is over.
        n_parameters: that the directions have.

    Returns:
        `sqrt(k / (n + k + 1))`: E<g, e> = |g|^2 and E|e|^2 = |g|^2 (n + k + 1) / k.
    """
    return math.sqrt(directions / (n_parameters + directions + 1))
