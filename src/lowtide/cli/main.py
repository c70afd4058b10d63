"""`lowtide COMMAND ...`: finds the command, prints its errors, sets the exit code.

0: done. 1: the work failed. 2: the command or its inputs were wrong. 130: interrupted.
"""

from __future__ import annotations

import importlib
import json
import sys
import warnings
from collections.abc import Sequence
from io import TextIOWrapper
from typing import Any

from lowtide import __version__
from lowtide.config import did_you_mean
from lowtide.errors import ConfigError, LowtideError, LowtideWarning

from .output import discard

COMMANDS = {
    "demo": "personalise the bundled model, start to finish, in about a minute",
    "train": "fine-tune a LoRA adapter on your data",
    "generate": "continue a prompt",
    "chat": "talk with a model in the terminal, with or without an adapter",
    "serve": "an OpenAI-compatible endpoint on this machine, and a chat in the browser",
    "eval": "loss and perplexity on a data set",
    "report": "one page about a run: curves, memory, samples, what happened",
    "runs": "the runs below a directory, side by side",
    "check": "our gradients against autograd, on your own model and data",
    "data": "look at a data set before training on it: `data check`",
    "plan": "what a run will need, before it runs",
    "quantize": "write a quantised copy of a model: 8 or 4 bits per weight",
    "merge": "fold an adapter into its model's weights",
    "export": "write an adapter, or a model, for llama.cpp: `export gguf`",
    "info": "what a model directory holds",
    "bench": "measure memory and time; the paper's tables, peers, reports",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name; None takes the process's.

    Returns:
        The exit code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, TextIOWrapper):
        # Text that the terminal's encoding lacks, or a path that is not UTF-8, is shown escaped.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = _guarded(arguments, as_json="--json" in arguments)
        sys.stdout.flush()  # now, while a failure can still be told
        return code
    except OSError as error:
        discard(sys.stdout)
        if not isinstance(error, BrokenPipeError):  # whoever closed the pipe knows
            print(f"lowtide: the output cannot be written: {error.strerror}.", file=sys.stderr)
        return 1


def _guarded(arguments: list[str], as_json: bool) -> int:
    """Run a command; its errors become a message and an exit code, its warnings a line."""
    try:
        with warnings.catch_warnings():
            _print_warnings()
            return _dispatch(arguments)
    except SystemExit as leaving:  # argparse, after --help
        return leaving.code if isinstance(leaving.code, int) else 0
    except LowtideError as error:
        return _fail(str(error), error.kind, error.exit_code, as_json)
    except KeyboardInterrupt:
        return _fail("interrupted.", "Interrupted", 130, as_json)
    except MemoryError:
        return _fail(_OUT_OF_MEMORY, "OutOfMemory", 1, as_json)
    except RuntimeError as error:
        if "allocate" not in str(error):
            raise
        return _fail(_OUT_OF_MEMORY, "OutOfMemory", 1, as_json)
    except OSError as error:
        if error.filename is None:
            raise
        return _fail(f"{error.filename}: {error.strerror}.", "OSError", 1, as_json)


def _print_warnings() -> None:
    """Our own warnings as one line on stderr, each time; others as Python has them."""
    usual = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, LowtideWarning):
            print(f"lowtide: {message}", file=sys.stderr)
        else:
            usual(message, category, *place, **more)

    warnings.simplefilter("always", LowtideWarning)
    warnings.showwarning = show


_OUT_OF_MEMORY = (
    "the system has not enough memory for this step. Lower --max-seq-length, --batch-size or "
    "--lora-r, or use --optimizer sgd."
)


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"lowtide {__version__}")
        return 0
    name = arguments[0]
    if name not in COMMANDS:
        raise ConfigError(
            f"unknown command {name!r}{did_you_mean(name, COMMANDS)}. Commands: "
            f"{', '.join(COMMANDS)}. See `lowtide --help`."
        )
    module = importlib.import_module(f"lowtide.cli.{name}_command")
    code: int = module.run(arguments[1:])
    return code


def _usage() -> str:
    lines = [f"  {name:<10} {text}" for name, text in COMMANDS.items()]
    return (
        "usage: lowtide COMMAND [flags]\n\nFine-tune language models on your own machine, with "
        "exact gradients, in about the memory\nthat running them takes.\n\ncommands:\n"
        + "\n".join(lines)
        + "\n\nEvery command takes --help, --config FILE.yaml and --json."
    )


def _fail(message: str, kind: str, code: int, as_json: bool) -> int:
    print(f"lowtide: {message}", file=sys.stderr)
    if as_json:
        print(json.dumps({"error": message, "kind": kind}))
    return code


if __name__ == "__main__":
    sys.exit(main())
