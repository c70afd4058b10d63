"""The process in which a peer is measured: `python -m lowtide.bench.peer_child SETTINGS_JSON`.

The meter is the one that lowtide's own steps are measured with. `peak_anon_bytes` is counted from
after the model was loaded, so the peer's float32 copy of the frozen weights is not in it;
`peak_anon_above_import_bytes` counts from after the peer's libraries were imported, and holds it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lowtide.errors import LowtideError
from lowtide.memory import measure

from .child import SkippedError

_TRL = (("trl", "peft", "transformers", "datasets"), "pip install 'lowtide[bench]'")
_NEEDS = {
    "trl+peft": _TRL,
    "trl+peft+patch": _TRL,
    "mlx-lm": (("mlx", "mlx_lm"), "pip install mlx-lm"),
}
_SEED = 0


def measured(settings: dict[str, Any]) -> dict[str, Any]:
    """Measure the peer that the settings name.

    Args:
        settings: of the case, `model` being a directory.

    Returns:
        Its figures.

    Raises:
        SkippedError: something that it needs is not installed.
    """
    modules, remedy = _NEEDS[settings["peer"]]
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise SkippedError(
            f"{settings['peer']} is not installed (missing: {', '.join(missing)}). To measure it: "
            f"{remedy}"
        )
    from . import peer_mlx, peer_trl

    run = peer_mlx.run if settings["peer"] == "mlx-lm" else peer_trl.run
    figures = run(settings)
    names = ("peak_anon_bytes", "peak_anon_above_import_bytes", "wall_s", "cpu_s")
    own = {name: settings[name] for name in ("peer", "checkpointing", "seq_len", "optimizer")}
    steps = figures.pop("steps")
    middle = {name: statistics.median(step[name] for step in steps[1:]) for name in names}
    whole = {name: int(v) if name.endswith("_bytes") else v for name, v in middle.items()}
    return {**own, **figures, **whole, "steps": steps[1:], "warmup_step": steps[0]}


class StepMeter:
    """Time and peaks of memory of each step; `begin` and `end` are called around one."""

    def __init__(self, meter: measure.MemoryMeter) -> None:
        """Count peaks from the process's memory now: call it when the model is loaded."""
        self.steps: list[dict[str, float]] = []
        self.model_bytes = measure.read_memory().anon_bytes - measure.AT_IMPORT.anon_bytes
        self._meter = meter
        self._wall = self._cpu = 0.0

    def begin(self) -> None:
        """A step begins."""
        self._meter.take()
        self._wall, self._cpu = time.perf_counter(), sum(os.times()[:2])

    def end(self) -> None:
        """The step is over."""
        wall, cpu = time.perf_counter() - self._wall, sum(os.times()[:2]) - self._cpu
        peak = self._meter.take()
        self.steps.append(
            {
                "peak_anon_bytes": peak.anon_bytes - self.model_bytes,
                "peak_anon_above_import_bytes": peak.anon_bytes,
                "peak_rss_bytes": peak.rss_bytes,
                "wall_s": wall,
                "cpu_s": cpu,
            }
        )


@contextmanager
def step_meter() -> Iterator[Callable[[], StepMeter]]:
    """Marks the import now; the meter that it yields is made when the model is loaded."""
    measure.mark_import()
    with measure.MemoryMeter() as meter:
        yield lambda: StepMeter(meter)


def main(arguments: Sequence[str]) -> int:
    """Measure and print one JSON document; the peers' own output goes to stderr."""
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    os.environ["HF_HUB_OFFLINE"] = "1"
    code = 0
    try:
        with tempfile.TemporaryDirectory() as directory:
            os.chdir(directory)  # what a peer writes beside itself
            document = measured(json.loads(arguments[0]))
    except LowtideError as error:
        document, code = {"error": str(error), "kind": error.kind}, error.exit_code
    print(json.dumps(document), file=out, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
