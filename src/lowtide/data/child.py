"""Start a worker of `lowtide.data`, named by the argument, without the rest of lowtide.

Run as a script. `import lowtide` loads torch, which tokenising does not use and which would cost
the child most of its start-up time and memory. So an empty package of that name stands in for it,
through which only the modules that the worker asks for are found.

A worker has `answer`, from a JSON request to a JSON answer. The request comes on stdin, the answer
goes to stdout: the worker's own, or {"error": kind, "message": text} for an error with a remedy.
Anything else that goes wrong ends the process with a traceback on stderr, which the parent passes
on.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import types
from pathlib import Path


def main() -> int:
    """Serve one request.

    Returns:
        The exit code: 0, or 1 after an error with a remedy.
    """
    package = types.ModuleType("lowtide")
    package.__path__ = [str(Path(__file__).resolve().parents[1])]
    sys.modules["lowtide"] = package
    from lowtide.errors import LowtideError

    worker = importlib.import_module(f"lowtide.data.{sys.argv[1]}")
    # Whatever a library prints must not mix with the answer.
    answer_to = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    request = sys.stdin.buffer.read().decode("utf-8")
    try:
        answer, code = worker.answer(request), 0
    except LowtideError as error:
        answer, code = json.dumps({"error": error.kind, "message": str(error)}), 1
    with answer_to:
        answer_to.write(answer)
    return code


if __name__ == "__main__":
    sys.exit(main())
