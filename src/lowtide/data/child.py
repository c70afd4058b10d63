"""Start `lowtide.data.worker` without the rest of lowtide.

Run as a script. `import lowtide` loads torch, which tokenising does not use and which would cost
the child most of its start-up time and memory. So an empty package of that name stands in for it,
through which only the modules that the worker asks for are found.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path


def main() -> int:
    """Serve one request; see `lowtide.data.worker`."""
    package = types.ModuleType("lowtide")
    package.__path__ = [str(Path(__file__).resolve().parents[1])]
    sys.modules["lowtide"] = package
    from lowtide.data import worker

    return worker.main()


if __name__ == "__main__":
    sys.exit(main())
