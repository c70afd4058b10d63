"""A results directory with every group, a failed and a skipped case; figures near real ones."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "lowtide": "0.1.0",
    "git_revision": "b89a264032e3",
    "python": "3.11.2",
    "torch": "2.13.0",
    "platform": "Linux-6.1-x86_64",
    "cpu": "Fictional 2-core processor <AVX2>",
    "cores": 2,
    "memory_bytes": 8_000_000_000,
    "threads": 2,
}
SMALL, MIDDLE, LARGE = "qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-3b"
METHODS: dict[str, dict[str, Any]] = {
    "mesp": {"method": "mesp"},
    "mebp-sweep": {"method": "mebp", "mebp_loss": "sweep"},
    "mebp-full": {"method": "mebp", "mebp_loss": "full"},
    "mezo": {"method": "mezo"},
}
# method -> MB at 0.5B and T = 256, seconds, CPU seconds, utilisation
BASE = {
    "mesp": (54.3, 6.72, 13.31, 0.82),
    "mebp-sweep": (97.6, 7.58, 15.02, 0.73),
    "mebp-full": (871.2, 9.41, 18.2, 0.59),
    "mezo": (48.9, 4.11, 8.05, 0.9),
}
SIZE = {SMALL: (1.0, 1.0), MIDDLE: (1.62, 3.3), LARGE: (2.21, 6.4)}
OUT_OF_MEMORY = "needs 9,100,000,000 bytes | the machine has 8,000,000,000 <free>\nsecond line"
H_3B_BYTES = 7 * 36 * 256 * 8 * 4
STORED_EXTRA = 2_105_344
"""What storing h costs in the fixture: 40,960 bytes more than h itself."""


def write(
    directory: Path, name: str, group: str, kind: str, settings: dict[str, Any], **more: Any
) -> Path:
    """Write one case file; `more` are its top-level fields."""
    document = {
        "format": "lowtide-bench/1",
        "name": name,
        "group": group,
        "kind": kind,
        "status": "done",
        "error": None,
        "case": settings,
        "environment": ENVIRONMENT,
        "started": f"2025-03-01T10:{len(name):02d}:00+00:00",
        "result": None,
        **more,
    }
    path = directory / "cases" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def step_settings(shape: str, method: str, seq_len: int = 256, rank: int = 8) -> dict[str, Any]:
    """The settings of a case of kind step."""
    return {
        "shape": shape,
        "model": shape,
        "seq_len": seq_len,
        "batch_size": 1,
        "lora_r": rank,
        "target_modules": "all-linear",
        "optimizer": "sgd",
        "compute_dtype": "float32",
        "steps": 3,
        **METHODS[method],
    }


def step_result(settings: dict[str, Any], megabytes: float, times: tuple[float, ...]) -> dict:
    """The result of a case of kind step: peak, wall, CPU, utilisation."""
    wall, cpu, utilization = times
    return {
        "method": settings["method"],
        "seq_len": settings["seq_len"],
        "lora_r": settings["lora_r"],
        "peak_anon_bytes": round(megabytes * 1e6),
        "peak_rss_bytes": round((megabytes + 1210.5) * 1e6),
        "wall_s": wall,
        "cpu_s": cpu,
        "tokens_per_s": settings["seq_len"] / wall,
        "gemm_utilization": utilization,
        "steps": [],
    }


def _step(directory: Path, group: str, settings: dict[str, Any], method: str) -> None:
    megabytes, wall, cpu, utilization = BASE[method]
    memory, time = SIZE[settings["shape"]]
    tokens = settings["seq_len"] / 256
    memory *= tokens ** (0.97 if method == "mebp-full" else 0.68)
    memory *= 1 + (settings["lora_r"] - 8) * 0.006
    time *= tokens**1.12
    name = f"{group}-{settings['shape']}-{method}-t{settings['seq_len']}-r{settings['lora_r']}"
    times = (wall * time, cpu * time, utilization)
    write(
        directory,
        name,
        group,
        "step",
        settings,
        result=step_result(settings, megabytes * memory, times),
    )


def add_steps(directory: Path) -> None:
    """Groups models (one case failed), sequence, rank; T = 256, r = 8 only among the models."""
    for shape in SIZE:
        for method in METHODS:
            settings = step_settings(shape, method)
            if (shape, method) == (LARGE, "mebp-full"):
                status = {"status": "failed", "error": OUT_OF_MEMORY}
                write(directory, "models-3b-mebp-full", "models", "step", settings, **status)
            else:
                _step(directory, "models", settings, method)
    for method in METHODS:
        for tokens in (128, 512, 1024):
            _step(directory, "sequence", step_settings(SMALL, method, tokens), method)
        for rank in (4, 16, 32):
            _step(directory, "rank", step_settings(SMALL, method, rank=rank), method)


def add_store_h(directory: Path) -> None:
    """Store h on 3B; recompute h is the case of the models."""
    settings = {**step_settings(LARGE, "mesp"), "recompute_h": False}
    recomputed = round(BASE["mesp"][0] * SIZE[LARGE][0] * 1e6)
    result = step_result(settings, (recomputed + STORED_EXTRA) / 1e6, (41.5, 82.4, 0.84))
    write(directory, "store-h-3b", "store_h", "step", settings, result=result)


def add_timelines(directory: Path) -> None:
    """One step of three methods, a sample every 5 ms."""
    for method, scale in (("mesp", 1.0), ("mebp-sweep", 1.8), ("mebp-full", 16.0)):
        kinds = ["adapter", "gradients", "optimizer", "block inputs", "buffers"]
        kinds += ["block intermediates", "loss", "model", "other"]
        samples = []
        for place in range(1300):
            phase = place / 1300
            forward = min(1.0, phase / 0.35)
            loss = 0.35 < phase < 0.45
            live = {
                "adapter": 17_600_000,
                "gradients": 190_000 if phase > 0.45 else 0,
                "optimizer": 0,
                "block inputs": round(22e6 * (forward if phase < 0.45 else (1 - phase) / 0.55)),
                "buffers": 9_000_000,
                "block intermediates": round(scale * 4e6 * (1.2 + math.sin(place / 6))),
                "loss": round(scale * 6e6) if loss else 0,
                "model": 300_000,
                "other": 500_000,
            }
            rss = sum(live.values()) + 1_500_000
            samples.append({"t_s": place * 0.005, "rss_anon_bytes": rss, "bytes": live})
        peak = max(samples, key=lambda sample: sample["rss_anon_bytes"])
        peak = {**peak, "sum_bytes": sum(peak["bytes"].values())}
        result = {
            "method": METHODS[method]["method"],
            "seq_len": 256,
            "kinds": kinds,
            "samples": samples,
            "peak": {**peak, "where": "backward of block 23: glu_backward"},
        }
        settings = step_settings(SMALL, method)
        write(directory, f"timeline-{method}", "timeline", "timeline", settings, result=result)
    settings, status = step_settings(SMALL, "mezo"), {"status": "failed", "error": "interrupted"}
    write(directory, "timeline-mezo", "timeline", "timeline", settings, **status)


def add_quality(directory: Path) -> None:
    """Cosines of 24 layers for 1, 4, 16, 64 directions."""
    n = 4_399_104
    directions = [1, 4, 16, 64]
    expected = {str(k): math.sqrt(k / (n + k + 1)) for k in directions}
    overall = {
        k: {"cosine": value * (0.6 + 0.1 * place), "expected": value}
        for place, (k, value) in enumerate(expected.items())
    }
    layers = [
        {
            "layer": layer,
            "n_parameters": n // 24,
            "cosine": {k: math.sin(layer * 1.7 + int(k)) * v for k, v in expected.items()},
        }
        for layer in range(24)
    ]
    result = {
        "n_parameters": n,
        "directions": directions,
        "overall": overall,
        "layers": layers,
    }
    write(directory, "quality", "quality", "quality", step_settings(SMALL, "mezo"), result=result)


def add_convergence(directory: Path) -> None:
    """Three methods, 200 steps; the last loss of one is not finite."""
    for method, rate, seconds in (
        ("mesp", 45, 0.031),
        ("mebp-sweep", 45, 0.036),
        ("mezo", 4e3, 0.02),
    ):
        curve = [
            {
                "step": step,
                "loss": 2.1 + 1.4 * math.exp(-step / rate) + 0.12 * math.sin(step * 2.3),
                "wall_s": round(step * seconds, 4),
                "n_tokens": 256,
            }
            for step in range(1, 201)
        ]
        valid = [{"step": s, "loss": 3.4 - s / 150, "wall_s": s * seconds} for s in (0, 100, 200)]
        settings = {**METHODS[method], "model": "stories260K", "data": "tinystories.txt"}
        result = {**METHODS[method], "data": "tinystories.txt", "curve": curve, "valid": valid}
        name = f"convergence-{method}"
        write(directory, name, "convergence", "convergence", settings, result=result)


def add_peers(directory: Path) -> None:
    """TRL + PEFT with and without checkpointing; mlx-lm is not installed."""
    for checkpointing, megabytes, wall, cpu in (
        (True, 927.4, 9.9, 20.2),
        (False, 1643.1, 7.1, 14.5),
    ):
        switch = {"peer": "trl+peft", "checkpointing": checkpointing, "seq_len": 256}
        result = {**switch, "peak_anon_bytes": round(megabytes * 1e6), "wall_s": wall}
        result |= {"cpu_s": cpu, "steps": []}
        result["peak_anon_above_import_bytes"] = round((megabytes + 1976.0) * 1e6)
        name = f"peer-trl-{'with' if checkpointing else 'without'}"
        write(
            directory,
            name,
            "peers",
            "peer",
            {"shape": SMALL, "model": SMALL, **switch},
            result=result,
        )
    settings = {
        "shape": SMALL,
        "model": SMALL,
        "peer": "mlx-lm",
        "checkpointing": True,
        "seq_len": 256,
    }
    reason = 'mlx-lm is not installed; pip install "mlx-lm"'
    status = {"status": "skipped", "error": reason}
    write(directory, "peer-mlx-lm", "peers", "peer", settings, **status)


def full(directory: Path) -> Path:
    """Every group."""
    for add in (add_steps, add_store_h, add_timelines, add_quality, add_convergence, add_peers):
        add(directory)
    return directory
