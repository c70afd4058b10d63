"""`lowtide bench step`: K training steps of one method on random token ids, measured."""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import torch

from lowtide.config import setting
from lowtide.memory.measure import MemoryMeter
from lowtide.methods import get_method
from lowtide.methods.options import OPTIONS_OF
from lowtide.model.adapter import Adapter
from lowtide.model.batch import Batch
from lowtide.model.decoder import Decoder
from lowtide.model.flops import step_flops
from lowtide.ops.products import product_
from lowtide.train.budget import within_budget
from lowtide.train.history import StepReport
from lowtide.train.loop import Trainer, measured_update
from lowtide.train.lora_settings import LoraSettings
from lowtide.train.optim import OPTIMIZERS
from lowtide.train.run import check_length, open_model
from lowtide.train.settings import ModelSettings, StepSettings, TrainSettings, check_step
from lowtide.weights.writer import tensor_bytes

from .shapes import SHAPES, ShapeSettings, cache_directory, shape_directory, shape_of
from .split import check_split, time_split

_RATE_SECONDS = 0.5
_PAIRED_STEPS = 2
_MEDIAN_BYTES = ("peak_anon_bytes", "peak_rss_bytes", "peak_file_bytes", "disk_read_bytes")


@dataclass(frozen=True, kw_only=True)
class ShapeModelSettings(ShapeSettings, ModelSettings):
    """Which model or shape, and how it computes."""

    model: str = setting(
        help=f"model directory, hub id, or a shape with random weights: {', '.join(SHAPES)}",
        filled=True,
    )


M = TypeVar("M", bound=ShapeModelSettings)


def nothing_said(text: str) -> None:
    """What is told of progress by default: nobody."""


def located(settings: M, say: Callable[[str], None] = nothing_said) -> M:
    """The settings with the path of its model where they name a shape.

    Args:
        settings: of a command that takes a shape for a model.
        say: told the size before a shape's weights are written.

    Returns:
        Settings that `open_model` can use.

    Raises:
        ModelError: there is no such shape or model, or its family is not supported.
        OutputError: the disk is too full for the shape's weights.
    """
    shape = shape_of(settings.model)
    if shape is None:
        return settings
    return replace(
        settings, model=str(shape_directory(shape, cache_directory(settings.cache_dir), say))
    )


@dataclass(frozen=True, kw_only=True)
class MeasuredStepSettings(StepSettings, ShapeModelSettings):
    """Steps to measure, whatever their length."""

    batch_size: int = setting(1, help="sequences per step", minimum=1)
    steps: int = setting(3, help="measured steps, after one that warms up", minimum=1)
    seed: int = setting(0, help="seed of the adapter and of the token ids", minimum=0)
    optimizer: str = setting("sgd", help="optimiser", choices=tuple(OPTIMIZERS))


@dataclass(frozen=True, kw_only=True)
class BenchStepSettings(MeasuredStepSettings):
    """Settings of `lowtide bench step`."""

    seq_len: int = setting(256, help="tokens per sequence", minimum=2)
    time_split: bool = setting(
        False,
        help="one more step, whose time is split into products, widening, attention, elementwise "
        "and loss",
    )


def bench_step(
    settings: BenchStepSettings, say: Callable[[str], None] = nothing_said
) -> dict[str, Any]:
    """Measure training steps on random token ids.

    Args:
        settings: model, method, sizes.
        say: told of what takes long before the first step.

    Returns:
        `method`, `seq_len`, `steps` (one object per measured step), `warmup_step`, and the median
        step's figures at the top level; bytes are `*_bytes`, times `*_s`.

    Raises:
        ConfigError: an option does not belong to the method.
        ModelError: there is no such shape or model, or it is not supported.
        DataError: the sequence is longer than the model's positions.
    """
    check_step(settings)
    if settings.time_split:
        check_split(settings.method)
    at = located(settings, say)
    model = open_model(at)
    check_length(model, settings.seq_len)
    lengths = (settings.seq_len,) * settings.batch_size
    settings, guard = within_budget(settings, model, lengths)
    adapter = Adapter.create(
        model, settings.lora_config(model.spec), settings.seed, settings.rounded_dtype
    )
    method = get_method(settings.method, settings)
    trainer = Trainer(model, adapter, method, train_settings(at), guard)
    trainer.reserve(lengths)
    batches = random_batches(model, settings)
    numbers = iter(range(1, 2 * settings.steps + 4))
    with MemoryMeter() as meter:

        def update() -> StepReport:
            return measured_update(trainer, [next(batches)], next(numbers), meter)

        reports = [update() for _ in range(settings.steps + 1)]
        # Steps of their own: what the products leave with malloc would show in a step's peak.
        rates = [product_rates(model, sum(lengths))]
        paired: list[StepReport] = []
        for _ in range(min(settings.steps, _PAIRED_STEPS)):
            paired.append(update())
            rates.append(product_rates(model, sum(lengths)))
        split = time_split(update) if settings.time_split else None
    warmup, measured = reports[0], reports[1:]
    flops = step_flops(model.spec, adapter.config, lengths, measured[0].n_tokens)
    median = _median(measured)
    utilization = [
        [
            flops / (report.wall_s * (before + after) / 2)
            for before, after in zip(*pair, strict=True)
        ]
        for report, pair in zip(paired, pairwise(rates), strict=True)
    ]
    by_torch, by_fastest = (statistics.median(each) for each in zip(*utilization, strict=True))
    return {
        **described(settings),
        "n_adapter_parameters": adapter.n_parameters,
        "adapter_sha256": adapter_digest(adapter),
        "threads": torch.get_num_threads(),
        **median,
        "gemm_utilization": by_torch,
        "product_utilization": by_fastest,
        "minimal_flops": flops,
        "gemm_flops_per_s": statistics.median(rate.by_torch for rate in rates),
        "product_flops_per_s": statistics.median(rate.by_fastest for rate in rates),
        "time_split_s": split,
        "budget_bytes": None if guard is None else guard.budget_bytes,
        "steps": [asdict(report) for report in measured],
        "warmup_step": asdict(warmup),
    }


def described(settings: BenchStepSettings) -> dict[str, Any]:
    """What a result says of its settings, the method's own options among them."""
    names = (
        *("model", "quantize", "seq_len", "batch_size", "optimizer", "lora_r"),
        *("optimizer_state", "adapter_dtype"),
        *(field.name for field in fields(LoraSettings) if field.name != "lora_r"),
    )
    return {
        name: getattr(settings, name) for name in ("method", *OPTIONS_OF[settings.method], *names)
    }


def adapter_digest(adapter: Adapter) -> str:
    """SHA-256 of the adapter's matrices as they lie in memory: equal means equal to the bit."""
    digest = hashlib.sha256()
    for _, parameter in adapter.items():
        digest.update(tensor_bytes(parameter))
    return digest.hexdigest()


def random_batches(model: Decoder, settings: BenchStepSettings) -> Iterator[Batch]:
    """Batches of random token ids without end, the same for the same seed."""
    generator = torch.Generator().manual_seed(settings.seed)
    shape = (settings.batch_size, settings.seq_len)
    while True:
        ids = torch.randint(0, model.spec.vocab_size, shape, generator=generator)
        yield Batch.from_sequences(ids.tolist())


def train_settings(settings: BenchStepSettings) -> TrainSettings:
    """The bench's settings as the trainer wants them; paths are not used."""
    shared = {f.name for f in fields(TrainSettings)}
    given = {name: value for name, value in asdict(settings).items() if name in shared}
    return TrainSettings(data="-", adapter_path="-", **given)


def _median(reports: list[StepReport]) -> dict[str, Any]:
    """The median of each figure over the steps."""
    names = ("loss", "wall_s", "cpu_s", "tokens_per_s", *_MEDIAN_BYTES)
    middle = {name: statistics.median(getattr(r, name) for r in reports) for name in names}
    return {name: int(v) if name.endswith("_bytes") else v for name, v in middle.items()}


class Rates(NamedTuple):
    """FLOP/s of float32 products: of `torch.mm`, and of the faster of it and `ops.products`."""

    by_torch: float
    by_fastest: float


def product_rates(model: Decoder, tokens: int) -> Rates:
    """FLOP/s of products on the model's own shapes, measured now.

    The MLP's products, whole and in the compute dtype: what a step would run at if it did nothing
    else. Random operands, repeated for about half a second: a machine's speed drifts, so it is
    measured before and after the steps that it is compared with.
    """
    spec, dtype = model.spec, model.compute_dtype
    shapes = [
        (tokens, spec.hidden_size),
        (spec.intermediate_size, spec.hidden_size),
        (tokens, spec.intermediate_size),
    ]
    x, weight, out = (torch.randn(shape, dtype=dtype) for shape in shapes)
    per_call = 2 * tokens * spec.hidden_size * spec.intermediate_size
    by_torch = per_call / _median_seconds(lambda: torch.mm(x, weight.t(), out=out))
    ours = per_call / _median_seconds(lambda: product_(out, x, weight.t()))
    return Rates(by_torch, max(by_torch, ours))


def _median_seconds(call: Callable[[], object]) -> float:
    times: list[float] = []
    stop = time.perf_counter() + _RATE_SECONDS / 2
    while time.perf_counter() < stop or len(times) < 3:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
