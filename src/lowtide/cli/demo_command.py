"""`lowtide demo`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowtide.config import setting
from lowtide.data.tokenizer import Tokenizer
from lowtide.demo.assets import asset_dir
from lowtide.demo.household import household, write_data
from lowtide.demo.play import Scored, bench_arguments, run_command, score, train_arguments
from lowtide.demo.requests import Example, exact_match
from lowtide.model.adapter import Adapter
from lowtide.model.decoder import load_model
from lowtide.model.threads import set_threads
from lowtide.train.output import check_output

from .output import Output, duration, megabytes, settings_of

_SAMPLES = 4
_DESCRIPTION = (
    "A household teaches the bundled model its own room names, nicknames and habits: accuracy on "
    "held-out requests before and after, memory and time beside plain autograd, and an adapter to "
    "go on with."
)


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """Settings of `lowtide demo`."""

    adapter_path: str = setting("lowtide-demo", help="directory for the adapter and the data")
    overwrite: bool = setting(False, help="replace the run that --adapter-path already holds")


def run(argv: Sequence[str]) -> int:
    """Play the user from data to answers."""
    settings, output = settings_of(DemoSettings, "demo", _DESCRIPTION, argv)
    start = time.perf_counter()
    directory = Path(settings.adapter_path).expanduser()
    check_output(directory, settings.overwrite)
    split = household()
    model, tokenizer = load_model(asset_dir()), Tokenizer.load(asset_dir())
    output.say(
        f"The bundled model ({model.spec.n_parameters / 1e6:.1f} M parameters) turns household "
        f"requests into JSON calls.\nIt has never heard of this household's own words. Asking it "
        f"{len(split.test)} held-out requests ..."
    )
    set_threads(model.spec, None)
    before = score(model, None, tokenizer, split.test)
    output.say(f"exact answers before: {before.accuracy:.0%}\n")
    data = write_data(directory / "data", split)
    arguments = train_arguments(data, directory)
    output.say(f"$ lowtide {' '.join(arguments)}")
    trained = run_command(arguments, lambda line: output.say("  " + line))
    adapter = Adapter.load(directory, model)
    after = score(model, adapter, tokenizer, split.test)
    _samples(output, split.test, before, after)
    output.say(f"exact answers before: {before.accuracy:.0%}   after: {after.accuracy:.0%}\n")
    methods = {name: run_command(bench_arguments(name), None) for name in ("mesp", "autograd")}
    _compare(output, methods)
    wall = time.perf_counter() - start
    _go_on(output, settings.adapter_path, data, split.test[0], wall)
    output.result(
        {
            "accuracy_before": before.accuracy,
            "accuracy_after": after.accuracy,
            "adapter_path": settings.adapter_path,
            "peak_anon_bytes": trained["peak_anon_bytes"],
            "steps": trained["steps"],
            "train_wall_s": trained["wall_s"],
            "wall_s": wall,
            "methods": {name: _figures(result) for name, result in methods.items()},
        }
    )
    return 0


def _figures(result: dict[str, Any]) -> dict[str, Any]:
    names = ("peak_anon_bytes", "peak_rss_bytes", "wall_s", "cpu_s")
    return {name: result[name] for name in names}


def _samples(output: Output, test: list[Example], before: Scored, after: Scored) -> None:
    """Some requests that the base model got wrong, with both answers."""
    rows = zip(test, before.answers, after.answers, strict=True)
    learnt = [row for row in rows if not exact_match(row[1], row[0].completion)]
    output.say("")
    for example, first, second in learnt[:_SAMPLES]:
        mark = "right" if exact_match(second, example.completion) else "wrong"
        output.say(f"  {example.prompt}")
        output.say(f"    before  {first.strip()}")
        output.say(f"    after   {second.strip()}   ({mark})")
    output.say("")


def _compare(output: Output, methods: dict[str, dict[str, Any]]) -> None:
    """Memory and time of a step at this batch size, each method in a fresh process."""
    one = methods["mesp"]
    output.say(
        f"one training step ({one['batch_size']} x {one['seq_len']} tokens), each method in a "
        "fresh process:"
    )
    for name, result in methods.items():
        output.say(
            f"  {name:<9} peak_anon_bytes {megabytes(result['peak_anon_bytes']):>9}   "
            f"wall {result['wall_s']:.2f} s   cpu {result['cpu_s']:.2f} s"
        )
    output.say("")


def _go_on(output: Output, adapter_path: str, data: Path, example: Example, wall: float) -> None:
    """The commands to go on with."""
    model = asset_dir()
    output.say(f"All of this took {duration(wall)}. Go on with:")
    output.say(
        f"  lowtide generate --model {model} --adapter-path {adapter_path} --prompt "
        f'"{example.prompt}"'
    )
    output.say(
        f"  lowtide eval --model {model} --adapter-path {adapter_path} --data {data} --mask-prompt"
    )
    output.say("  lowtide train --model Qwen/Qwen2.5-0.5B --data your.jsonl --adapter-path mine")
