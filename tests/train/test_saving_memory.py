"""A checkpoint is written and read in bounded memory, however large adapter and state are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import small

SCRIPT = """
import json, sys
from pathlib import Path
import torch
import lowtide as lt
from lowtide.config import build
from lowtide.memory.measure import MemoryMeter
from lowtide.train.checkpoints import OPTIMIZER_FILE, Checkpoints
from lowtide.train.history import History
from lowtide.train.run_dir import Identity, RunDir
from lowtide.train.settings import TrainSettings

root = Path(sys.argv[1])
name = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
parameters = {
    name.format(layer, part): torch.randn(shape)
    for layer in range(8) for part, shape in (("A", (64, 8192)), ("B", (8192, 64)))
}
state = {
    f"moments.{n}.{key}": torch.randn(p.shape) for n in (0, 1) for key, p in parameters.items()
}
adapter = lt.Adapter(lt.LoraConfig(r=64), parameters)
settings = build(TrainSettings, {"model": "-", "data": "-", "adapter_path": str(root)})
run_dir = RunDir(root, Identity(settings, {}, {}))
position = {"epoch": 0, "offset": 0}
run_dir.save(adapter, state, position, History())
run_dir.confirm()
with MemoryMeter() as meter:
    before = meter.take().anon_bytes
    run_dir.save(adapter, state, position, History(step=1))
    run_dir.confirm()
    saving = meter.take().anon_bytes - before
    checkpoint, _ = Checkpoints(root).newest()
    checkpoint.load(state, OPTIMIZER_FILE)
    loading = meter.take().anon_bytes - before
held = sum(t.nbytes for t in (*parameters.values(), *state.values()))
print(json.dumps([held, saving, loading]))
"""


def test_saving_and_loading_take_no_memory_to_speak_of(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "run")], capture_output=True, text=True,
        env=small.environment(), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    held, saving, loading = json.loads(done.stdout)
    assert held == 3 * 16 * 64 * 8192 * 4  # 100 MB
    assert saving < 1_000_000
    assert loading < 1_000_000
