"""A model given by path or by hub id becomes a local directory."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from lowtide.errors import ModelError
from lowtide.weights.gguf.file import is_gguf

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_WANTED = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]


def resolve_model(model: str) -> Path:
    """A local path for `model`, downloading from the hub when it is an id.

    Args:
        model: a path, or an id such as `Qwen/Qwen2.5-0.5B`.

    Returns:
        A directory or a GGUF file. Whether it holds a usable model is for the caller to find out.

    Raises:
        ModelError: the path is empty, or the id cannot be found, reached or may not be read.
    """
    if not model.strip():
        raise ModelError(
            "the model is an empty path; give a directory, a GGUF file or a hub id such as "
            "Qwen/Qwen2.5-0.5B."
        )
    path = Path(model).expanduser()
    if path.exists() or is_gguf(path) or not _HUB_ID.fullmatch(model):
        return path
    return _download(model)


def _download(repo: str) -> Path:
    """Download in a child process: the hub's client would stay in this one's memory."""
    # A session of its own: Ctrl-C reaches this process only, which then ends the child.
    child = subprocess.run(
        [sys.executable, "-P", "-m", "lowtide.model.hub", repo],
        stdout=subprocess.PIPE,
        check=False,
        start_new_session=True,
    )
    try:
        answer = json.loads(child.stdout)
    except ValueError as error:
        raise ModelError(
            f"downloading {repo} stopped with exit code {child.returncode}. Try again, or give the "
            "path of a local model directory."
        ) from error
    if "error" in answer:
        raise ModelError(answer["error"])
    return Path(answer["directory"])


def _download_here(repo: str) -> Path:
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, allow_patterns=_WANTED))
    except hub.GatedRepoError as error:
        raise ModelError(
            f"{repo} is gated on the Hugging Face hub. Accept its terms on "
            f"https://huggingface.co/{repo}, then run `hf auth login` and try again."
        ) from error
    except hub.RepositoryNotFoundError as error:
        raise ModelError(
            f"there is no directory {repo!r} here and no such model on the Hugging Face hub (or it "
            "is private: run `hf auth login`). Check the spelling."
        ) from error
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled) as error:
        raise ModelError(
            f"there is no directory {repo!r} here, it is not in the local hub cache, and the "
            f"Hugging Face hub cannot be reached ({type(error).__name__}). Go online once to "
            "download it, or give the path of a local model directory."
        ) from error
    except (hub.HfHubHTTPError, OSError) as error:
        raise ModelError(
            f"downloading {repo} from the Hugging Face hub failed ({type(error).__name__}: "
            f"{error}). Try again later, or give the path of a local model directory."
        ) from error


if __name__ == "__main__":
    try:
        print(json.dumps({"directory": str(_download_here(sys.argv[1]))}))
    except ModelError as refusal:
        print(json.dumps({"error": str(refusal)}))
