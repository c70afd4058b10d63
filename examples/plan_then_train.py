"""Plan a run, train it within the plan, and ask what it has learned.

    python examples/plan_then_train.py MODEL DATA OUT

MODEL is a model directory or hub id, DATA a file with `prompt` and `completion` (or any other
format of docs/data.md), OUT the directory of the adapter.
"""

from __future__ import annotations

import sys

import lowtide as lt


def main(model: str, data: str, out: str) -> None:
    """Plan, train, ask."""
    work = {"model": model, "max_seq_length": 64, "memory_budget": "30MB"}
    plan = lt.plan(**work)
    print(f"a step will take {plan.predicted_peak_bytes / 1e6:.1f} MB, as {plan.options}")
    done = lt.train(data=data, adapter_path=out, iters=20, mask_prompt=True, **work)
    print(f"it took {done.peak_anon_bytes / 1e6:.1f} MB; the loss is {done.loss:.3f}")
    decoder = lt.load_model(model)
    adapter = lt.Adapter.load(out, decoder)
    question = "it is story time"
    print("before:", lt.ask(decoder, None, question, max_tokens=40))
    print("after: ", lt.ask(decoder, adapter, question, max_tokens=40))


if __name__ == "__main__":
    main(*sys.argv[1:])
