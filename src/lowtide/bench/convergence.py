"""Loss against steps and against time: the demo's household learnt by several methods."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lowtide.command import lowtide_command
from lowtide.demo.assets import asset_dir
from lowtide.demo.household import FINE_TUNING, write_data
from lowtide.errors import LowtideError
from lowtide.train.output import METRICS_FILE

from .child import flags_of, run_child
from .shapes import DEMO_MODEL

CONVERGENCE_METHODS = ("mesp", "mebp", "mezo")
DEMO_DATA = "household"
_EVALS = 9
_MEZO_ITERS = 4
"""MeZO gets this many times the steps: each is cheaper, and teaches far less."""


def convergence_settings(method: str, iters: int) -> dict[str, Any]:
    """The settings of one case: equal for all methods, but for the number of MeZO's steps.

    AdamW at the household's learning rate is also what MeZO does best with: SGD at 1e-3 and 3e-3
    learns less in as many steps, at 1e-2 and above it diverges, and AdamW at 1e-3 learns less.

    Args:
        method: one of CONVERGENCE_METHODS.
        iters: updates of an exact method.

    Returns:
        Settings of `lowtide train`; `model` and `data` name what is bundled.
    """
    return {
        "shape": None,
        "model": DEMO_MODEL,
        "data": DEMO_DATA,
        "method": method,
        "iters": iters * (_MEZO_ITERS if method == "mezo" else 1),
        "batch_size": FINE_TUNING.batch_size,
        "max_seq_length": 128,
        "mask_prompt": True,
        "lora_r": FINE_TUNING.r,
        "lora_alpha": FINE_TUNING.lora_alpha,
        "target_modules": FINE_TUNING.target_modules,
        "compute_dtype": "float32",
        "optimizer": "adamw",
        "learning_rate": FINE_TUNING.learning_rate,
        "steps_per_eval": max(1, iters // _EVALS),
        "val_batches": 0,
        "seed": 0,
    }


def run_convergence(settings: Mapping[str, Any], scratch: Path) -> dict[str, Any]:
    """Train in a fresh process and read what it logged.

    Args:
        settings: of the case.
        scratch: directory for the data and the run.

    Returns:
        `method`, `data`, and the curves of the training and the validation loss.

    Raises:
        LowtideError: training failed, or logged nothing.
    """
    data, out = write_data(scratch / "data"), scratch / "run"
    given = {**settings, "model": asset_dir(), "data": data, "adapter_path": out}
    trained = run_child(lowtide_command("train", *flags_of(given)), scratch)
    lines = (out / METRICS_FILE).read_text(encoding="utf-8").splitlines()
    curve, valid = curves(json.loads(line) for line in lines)
    if not curve:
        raise LowtideError("the run logged no step.")
    figures = {name: trained[name] for name in ("peak_anon_bytes", "wall_s", "cpu_s")}
    own = {"method": settings["method"], "data": settings["data"]}
    return {**own, **figures, "curve": curve, "valid": valid}


def curves(
    entries: Iterable[Mapping[str, Any]],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The curves in a run's metrics; `wall_s` adds up the steps, validations aside.

    Args:
        entries: the lines of metrics.jsonl, parsed.

    Returns:
        The training loss of each step and the validation losses.
    """
    curve: list[dict[str, Any]] = []
    valid: list[dict[str, Any]] = []
    wall = 0.0
    for entry in entries:
        if "valid_loss" in entry:
            valid.append({"step": entry["step"], "loss": entry["valid_loss"], "wall_s": wall})
            continue
        wall += entry["wall_s"]
        point = {name: entry[name] for name in ("step", "loss", "n_tokens")}
        curve.append({**point, "wall_s": wall})
    return curve, valid
