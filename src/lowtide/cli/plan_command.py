"""`lowtide plan`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from lowtide.memory.choice import chosen, lossy
from lowtide.memory.plan import Plan, Workload, accumulated_bytes, optimizer_bytes
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
        f"{settings.method}, {question.work.tokens:,} tokens, {question.work.config.in_words()}, "
        f"{settings.optimizer}: {_name(plan)}"
    )
    for kind, count in sorted(plan.by_kind.items(), key=lambda item: -item[1]):
        if count:
            output.say(f"  {kind:<16} {megabytes(count):>12}")
    output.say(f"  {'predicted peak':<16} {megabytes(plan.predicted_peak_bytes):>12}")
    for line in _about_the_optimizer(settings, question.work):
        output.say(line)
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
            "settings": {
                **chosen(plan.options),
                "optimizer_state": settings.optimizer_state,
                "adapter_dtype": settings.adapter_dtype,
                "accumulate": settings.accumulate,
            },
            "lossy": [asdict(one) for one in lossy(question.work)],
            "accumulated_bytes": accumulated_bytes(question.work),
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


def _about_the_optimizer(settings: PlanSettings, work: Workload) -> list[str]:
    """What is kept of the adapter and its gradients, and what the other ways would take."""
    gradients, held = megabytes(accumulated_bytes(work)), megabytes(optimizer_bytes(work))
    if settings.accumulate:
        applied = (
            f"gradients are summed before the optimiser is applied (--accumulate): {gradients}; "
            "applied in the backward, each as it comes, they take none"
        )
    else:
        applied = (
            "the optimiser is applied in the backward, to each gradient as it comes; summing them "
            f"first (--grad-accumulation-steps, --clip-mode accumulate) takes {gradients} more"
        )
    in_use = f"in use: --optimizer-state {settings.optimizer_state}"
    in_use += f" --adapter-dtype {settings.adapter_dtype}, optimiser {held}"
    others = [
        f"lossy, chosen by nobody but you: {one.setting} takes {megabytes(one.saves_bytes)} less"
        for one in lossy(work)
    ]
    return [in_use, applied, *others]


def _name(plan: Plan) -> str:
    """The setting as flags."""
    options = plan.options
    return (
        f"--keep-blocks {options.keep_blocks} --block-inputs {options.block_inputs} "
        f"--tiles {options.tiles}"
    )
