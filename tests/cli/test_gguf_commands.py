"""Every command that takes a model takes a GGUF file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gguf_files import all_in, plain_model, random_weights, write
from small import CONFIG, SENTENCES, run, write_jsonl, write_small_tokenizer

import lowtide as lt
from lowtide.export.gguf_tokenizer import tokenizer_metadata
from lowtide.model.families import spec_from_config


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A GGUF file with its tokenizer, the model directory that it unpacks to, and data."""
    root = tmp_path_factory.mktemp("gguf")
    plain = root / "plain"
    plain.mkdir()
    write_small_tokenizer(plain)
    spec = spec_from_config(CONFIG)
    weights, said = random_weights(spec.tensor_shapes()), tokenizer_metadata(plain, spec.vocab_size)
    unpacked = write(root / "model.gguf", CONFIG, weights, all_in("Q4_1"), said)
    plain_model(plain, CONFIG, unpacked)
    rows = [{"prompt": text[:12], "completion": text[12:]} for text in SENTENCES]
    return root / "model.gguf", plain, write_jsonl(root / "data.jsonl", rows)


@pytest.mark.usefixtures("unpacked_here")
def test_every_command(places: tuple[Path, Path, Path]) -> None:
    file, plain, data = places
    model = ["--model", file]
    info = run("info", file, "--json")
    assert info.code == 0, info.err
    assert info.document["chat_template"] is not None
    for command in (
        ["plan", *model, "--max-seq-length", 32, "--json"],
        ["check", *model, "--data", data, "--max-seq-length", 32, "--json"],
        ["data", "check", *model, "--data", data, "--max-seq-length", 64, "--json"],
        ["bench", "step", *model, "--seq-len", 32, "--steps", 1, "--json"],
    ):
        done = run(*command)
        assert done.code == 0, (command, done.err)
    ours, theirs = (
        run("generate", "--model", one, "--prompt", "The number", "--max-tokens", 9, "--json")
        for one in (file, plain)
    )
    assert ours.code == 0, ours.err
    assert ours.document["text"] == theirs.document["text"]
    losses = [
        run("eval", "--model", one, "--data", data, "--max-seq-length", 48, "--json")
        for one in (file, plain)
    ]
    assert losses[0].document["loss"] == losses[1].document["loss"]


@pytest.mark.usefixtures("unpacked_here")
def test_a_run_on_a_file_is_the_run_on_what_it_unpacks_to(
    places: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    """And it goes on where it ended; another file is another model."""
    file, plain, data = places
    out = tmp_path / "file"
    flags = ["--data", data, "--max-seq-length", 48, "--seed", 3, "--save-every", 2]
    for model, to, iters in ((file, out, 4), (plain, tmp_path / "plain", 6)):
        done = run("train", "--model", model, "--adapter-path", to, "--iters", iters, *flags)
        assert done.code == 0, done.err
    more = ["--adapter-path", out, "--iters", 6, "--resume", *flags]
    done = run("train", "--model", file, *more)
    assert done.code == 0, done.err
    adapters = [lt.Adapter.load(one, lt.load_model(plain)) for one in (out, tmp_path / "plain")]
    for name, parameter in adapters[0].items():
        assert parameter.equal(adapters[1].parameters[name]), name
    said = json.loads((out / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == str(file)
    other = tmp_path / "other.gguf"
    weights = random_weights(spec_from_config(CONFIG).tensor_shapes())
    spec = spec_from_config(CONFIG)
    write(other, CONFIG, weights, all_in("Q8_0"), tokenizer_metadata(plain, spec.vocab_size))
    refused = run("train", "--model", other, *more[:3], 8, *more[4:])
    assert refused.code == 2, refused.err
