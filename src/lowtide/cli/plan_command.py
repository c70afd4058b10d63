"""`lowtide plan`."""

from __future__ import annotations

from collections.abc import Sequence

from lowtide.memory.plan import Plan, chosen
from lowtide.train.budget import PlanSettings, Question
from lowtide.train.run import open_model

from .output import megabytes, settings_of


def run(argv: Sequence[str]) -> int:
    """Print what a run will need, and what other settings would."""
    settings, output = settings_of(
        PlanSettings,
        "plan",
        "What a run will need, predicted before it starts; with --memory-budget, the fastest "
        "setting that fits. Bytes are of peak_anon_bytes, above Python and torch themselves.",
        argv,
    )
    question = Question(settings, open_model(settings))
    plan, others, longest = question.plan(), question.alternatives(), question.longest()
    output.say(
        f"{settings.method}, {question.work.tokens:,} tokens, LoRA r={settings.lora_r}, "
        f"{settings.optimizer}: {_name(plan)}"
    )
    for kind, count in sorted(plan.by_kind.items(), key=lambda item: -item[1]):
        if count:
            output.say(f"  {kind:<16} {megabytes(count):>12}")
    output.say(f"  {'predicted peak':<16} {megabytes(plan.predicted_peak_bytes):>12}")
    output.say("settings, the fastest first, and the smallest budget for each:")
    for other in others:
        mark = "->" if other.options == plan.options else "  "
        output.say(f"{mark} {megabytes(other.needed_bytes):>12}  {_name(other)}")
    if longest is not None:
        output.say(f"sequences of up to {longest:,} tokens fit into {settings.memory_budget}")
    output.result(
        {
            "predicted_peak_bytes": plan.predicted_peak_bytes,
            "by_kind": plan.by_kind,
            "settings": chosen(plan.options),
            "needed_bytes": plan.needed_bytes,
            "budget_bytes": question.budget,
            "longest_sequence": longest,
            "alternatives": [
                {
                    "predicted_peak_bytes": p.predicted_peak_bytes,
                    "needed_bytes": p.needed_bytes,
                    "settings": chosen(p.options),
                }
                for p in others
            ],
        }
    )
    return 0


def _name(plan: Plan) -> str:
    """The setting as flags."""
    options = plan.options
    return (
        f"--keep-blocks {options.keep_blocks} --block-inputs {options.block_inputs} "
        f"--tiles {options.tiles}"
    )
