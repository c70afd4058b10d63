"""Wrong settings and paths: exit code 2, what was found and what to do, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import small

import lowtide as lt
from lowtide.errors import ConfigError, LowtideError, OutputError


def refused(outcome: small.Outcome, *parts: str, code: int = 2) -> None:
    """The command ended with `code` and said all of this, without a traceback."""
    assert outcome.code == code, outcome
    assert outcome.err.startswith("lowtide: "), outcome.err
    assert "Traceback" not in outcome.err
    for part in parts:
        assert part in outcome.err, f"{part!r} is not in:\n{outcome.err}"


def train(model: Path, data: Path, out: object, *more: object) -> small.Outcome:
    base = ("--iters", 1, "--max-seq-length", 32)
    return small.run("train", "--model", model, "--data", data, "--adapter-path", out, *base, *more)


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--lora-r", "0"], ["lora_r = 0: expected at least 1"]),
        (["--lora-r", "-3"], ["lora_r = -3: expected at least 1"]),
        (["--lora-alpha", "nan"], ["lora_alpha = nan: expected a finite number"]),
        (["--lora-alpha", "0"], ["lora_alpha = 0.0: expected more than 0"]),
        (["--lora-dropout", "1"], ["lora_dropout = 1.0: expected at most 0.99"]),
        (
            ["--target-modules", "q_proj,w_proj"],
            ["target_modules 'w_proj'", "q_proj, k_proj, v_proj"],
        ),
        (["--target-modules", ","], ["target_modules is empty", "all-linear"]),
        (["--target-modules", "lm_head"], ["'lm_head'", "the output head is frozen"]),
        (["--method", "mespp"], ["choose mesp", "did you mean 'mesp'?"]),
        (["--optimizer", "adam"], ["choose sgd, adamw, lion, adafactor; did you mean 'adamw'?"]),
        (["--learning-rate", "-1"], ["learning_rate = -1.0: expected more than 0"]),
        (["--iters", "0"], ["iters = 0: expected at least 1"]),
        (["--batch-size", "0"], ["batch_size = 0: expected at least 1"]),
        (["--seed", "-1"], ["seed = -1: expected at least 0"]),
        (["--seed", str(2**70)], ["expected at most 9223372036854775807"]),
        (["--threads", "0"], ["threads = 0: expected at least 1"]),
        (["--max-seq-length", "1"], ["max_seq_length = 1: expected at least 2"]),
        (["--max-seq-length", "65"], ["--max-seq-length 65", "64 positions", "64 or less"]),
        (["--compute-dtype", "bfloat16"], ["choose float32, float64"]),
        (["--resume"], ["is not a directory", "Start the run without --resume"]),
        (["--resume-anyway"], ["--resume-anyway is for --resume, which is not given"]),
        (["--keep-checkpoints", "0"], ["keep_checkpoints = 0: expected at least 1"]),
        (["--save-minutes", "0"], ["save_minutes = 0.0: expected more than 0"]),
        (["--valid-data", "x.jsonl", "--valid-records", "2"], ["--valid-records, not both"]),
        (["--valid-records", "24"], ["too few records to hold out 24"]),
        (["--itres", "5"], ["unknown argument '--itres'; did you mean '--iters'?"]),
        (["--lr", "5"], ["did you mean '--learning-rate'?", "lowtide train --help"]),
    ],
)
def test_a_wrong_setting_of_train(
    model: Path, data: Path, tmp_path: Path, flags: list[str], parts: list[str]
) -> None:
    refused(train(model, data, tmp_path / "out", *flags), *parts)
    assert small.tree(tmp_path) == {}


def test_python_gives_the_same_errors_as_the_command_line(
    model: Path, data: Path, tmp_path: Path
) -> None:
    good: dict[str, Any] = {"model": model, "data": data, "adapter_path": tmp_path / "out"}
    for wrong, message in (
        ({"lora_r": 0}, "lora_r = 0: expected at least 1"),
        ({"lr": 1}, "unknown setting 'lr'; did you mean 'learning_rate'?"),
        ({"itres": 1}, "unknown setting 'itres'; did you mean 'iters'?"),
        ({"model": ""}, "model is empty"),
        ({"data": None}, "data = None: expected text"),
        ({"iters": "many"}, "iters = 'many': expected a whole number"),
        ({"lora_alpha": float("nan")}, "lora_alpha = nan: expected a finite number"),
        ({"max_seq_length": 65}, "--max-seq-length 65 is more than the model's 64 positions"),
        ({"target_modules": ["q_proj", "w_proj"], "max_seq_length": 8}, "target_modules 'w_proj'"),
        ({"data": "a\0b"}, "expected text without NUL"),
    ):
        with pytest.raises(LowtideError) as error:
            lt.train(**{**good, **wrong})
        assert message in str(error.value)
        assert error.value.exit_code == 2
    with pytest.raises(ConfigError, match="--model is required"):
        lt.train(data=data, adapter_path=tmp_path / "out")
    assert small.tree(tmp_path) == {}


def test_settings_made_by_hand_are_checked_too(model: Path, data: Path, tmp_path: Path) -> None:
    from lowtide.train.settings import TrainSettings

    settings = TrainSettings(
        model=str(model), data=str(data), adapter_path=str(tmp_path / "out"), lora_r=-1
    )
    with pytest.raises(ConfigError, match="lora_r = -1"):
        lt.train(settings)
    with pytest.raises(ConfigError, match=r"settings or keywords, not both \(iters\)"):
        lt.train(settings, iters=3)


@pytest.mark.parametrize("name", ["--model", "--data", "--adapter-path", "--tokenizer"])
def test_an_empty_path(model: Path, data: Path, tmp_path: Path, name: str) -> None:
    outcome = train(model, data, tmp_path / "out", name, "")
    refused(outcome, f"{name.strip('-').replace('-', '_')} is empty")
    assert small.tree(tmp_path) == {}


@pytest.mark.parametrize(
    ("command", "name", "parts"),
    [
        ("train", "--model", ["does not exist", "config.json", "hub id"]),
        ("train", "--data", ["no data at", "No such file"]),
        ("train", "--tokenizer", ["no tokenizer", "is not a directory"]),
        ("train", "--valid-data", ["no data at", "No such file"]),
        ("train", "--chat-template", ["cannot read the chat template", "No such file"]),
        ("train", "--config", ["there is no such file"]),
        ("eval", "--model", ["does not exist"]),
        ("eval", "--data", ["no data at"]),
        ("eval", "--adapter-path", ["is not a directory", "adapter_config.json"]),
        ("generate", "--model", ["does not exist"]),
        ("generate", "--adapter-path", ["is not a directory", "adapter_config.json"]),
        ("generate", "--tokenizer", ["no tokenizer"]),
        ("generate", "--chat-template", ["cannot read the chat template"]),
        ("info", "--model", ["does not exist"]),
    ],
)
def test_a_missing_path(
    model: Path, data: Path, tmp_path: Path, command: str, name: str, parts: list[str]
) -> None:
    missing = tmp_path / "there is none"
    given: dict[str, object] = {"--model": model}
    if command in ("train", "eval"):
        given |= {"--data": data, "--max-seq-length": 32}
    if command == "train":
        given["--adapter-path"] = tmp_path / "out"
    given[name] = missing
    refused(small.run(command, *[part for pair in given.items() for part in pair]), *parts)
    assert small.tree(tmp_path) == {}


def test_a_directory_where_a_file_is_expected_and_the_other_way_round(
    model: Path, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "dir").mkdir()
    (tmp_path / "file").write_text("{}")
    before = small.tree(tmp_path)
    out = tmp_path / "out"
    refused(train(tmp_path / "file", data, out), "is a file", "give a model directory")
    refused(train(model, tmp_path / "dir", out), "holds no train.jsonl", "it holds nothing")
    refused(train(model, tmp_path / "file", out), "unknown suffix ''", ".jsonl, .json or .txt")
    refused(train(model, data, tmp_path / "file"), "is a file; name a directory")
    refused(train(model, data, tmp_path / "file" / "out"), "file is a file, so no directory")
    refused(train(model, data, out, "--tokenizer", tmp_path / "file"), "is not a directory")
    refused(train(model, data, out, "--chat-template", tmp_path), "Is a directory")
    refused(train(model, data, out, "--config", tmp_path), "cannot be read as YAML")
    refused(
        small.run("generate", "--model", model, "--adapter-path", tmp_path / "file"),
        "file is not a directory; give a PEFT adapter directory",
    )
    refused(
        small.run("generate", "--model", model, "--adapter-path", tmp_path / "dir"),
        "has no adapter_config.json",
    )
    assert small.tree(tmp_path) == before


def test_yaml_mistakes_come_before_anything_is_read(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: nowhere\ndata: nothing\nadapter-path: x\nitres: 3\nlora_r: lots\n")
    refused(
        small.run("train", "--config", file),
        "unknown setting 'itres'; did you mean 'iters'?",
        "lora_r = 'lots': expected a whole number",
    )
    file.write_text("- model\n")
    refused(small.run("train", "--config", file), "holds list; expected key: value")
    assert set(small.tree(tmp_path)) == {"run.yaml"}


def test_an_output_directory_that_holds_a_run_needs_overwrite(
    model: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert train(model, data, out).code == 0
    (out / "tokenized").mkdir()
    (out / "tokenized" / "notes.txt").write_text("mine")
    before = small.tree(out)
    refused(train(model, data, out), "already holds a run", "adapter_config.json", "--overwrite")
    assert small.tree(out) == before
    assert train(model, data, out, "--overwrite", "--lora-r", 3).code == 0
    after = small.tree(out)
    assert set(after) == set(before)
    assert after["adapter_model.safetensors"] != before["adapter_model.safetensors"]
    assert after["tokenized/notes.txt"] == b"mine"


def test_a_run_that_cannot_start_leaves_the_run_that_it_was_to_replace(
    model: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert train(model, data, out).code == 0
    before = small.tree(tmp_path)
    bad = small.write_jsonl(tmp_path / "bad.jsonl", ['{"text": "a b c"}', "{"])
    before = small.tree(tmp_path)
    refused(train(model, bad, out, "--overwrite"), "line 2: not valid JSON")
    assert small.tree(tmp_path) == before


def test_a_directory_below_proc_cannot_be_made(model: Path, data: Path) -> None:
    refused(train(model, data, "/proc/lowtide/out"), "--adapter-path /proc/lowtide/out", "written")


def test_links(model: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "dangling").symlink_to("nowhere")
    assert train(model, data, tmp_path / "link").code == 0
    assert (tmp_path / "real" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "link").is_symlink()
    refused(train(model, data, tmp_path / "dangling"), "is a link to nowhere, which does not exist")
    assert os.readlink(tmp_path / "dangling") == "nowhere"


def test_spaces_and_other_scripts_in_every_path(model: Path, data: Path, tmp_path: Path) -> None:
    place = tmp_path / "Домой ñ 家 'q\" $x"
    shutil.copytree(model, place / "my model")
    rows = place / "my data.jsonl"
    shutil.copy(data, rows)
    out = place / "new" / "an adapter"
    done = train(place / "my model", rows, out)
    assert done.code == 0, done.err
    assert "'\"'\"'" in done.out  # the command to go on with is quoted for a shell
    adapted = ("--model", place / "my model", "--adapter-path", out)
    assert small.run("generate", *adapted, "--prompt", "é 家", "--max-tokens", 3).code == 0
    assert small.run("eval", *adapted, "--data", rows, "--max-seq-length", 32).code == 0


def test_too_small_a_disk_is_found_before_the_data_is_read(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**6, total=10**9))
    refused(
        train(model, tmp_path / "no data", tmp_path / "out"),
        "has 1.0 MB free",
        "3 checkpoints of 0.1 MB need 1.3 MB",
        "Free some space",
    )
    with pytest.raises(OutputError, match=r"has 1.0 MB free"):
        lt.train(model=model, data=data, adapter_path=tmp_path / "out", max_seq_length=32)
    assert small.tree(tmp_path) == {}


def test_json_errors_are_one_document(model: Path, data: Path, tmp_path: Path) -> None:
    outcome = train(model, data, tmp_path / "out", "--lora-r", 0, "--json")
    assert outcome.code == 2
    document = json.loads(outcome.out)
    assert document["kind"] == "ConfigError"
    assert "lora_r = 0" in document["error"]


@pytest.mark.parametrize(
    ("argv", "code", "parts"),
    [
        ([], 2, ["usage: lowtide COMMAND", "train", "generate"]),
        (["--help"], 0, ["usage: lowtide COMMAND"]),
        (["--version"], 0, ["lowtide 0."]),
        (["trian"], 2, ["unknown command 'trian'; did you mean 'train'?", "lowtide --help"]),
        (["bench"], 2, ["bench: no name", "step"]),
        (["bench", "stpe"], 2, ["unknown bench 'stpe'; did you mean 'step'?"]),
        (["train"], 2, ["--model is required", "--data is required", "--adapter-path is required"]),
        (["eval"], 2, ["--model is required", "--data is required"]),
        (["generate"], 2, ["--model is required"]),
        (["info"], 2, ["--model is required"]),
        (["bench", "step"], 2, ["--model is required"]),
    ],
)
def test_the_command_itself(argv: list[str], code: int, parts: list[str]) -> None:
    outcome = small.run(*argv)
    assert outcome.code == code
    for part in parts:
        assert part in outcome.out + outcome.err


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--temperature", "-1"], "temperature = -1.0: expected at least 0"),
        (["--temperature", "inf"], "temperature = inf: expected a finite number"),
        (["--top-p", "0"], "top_p = 0.0: expected more than 0"),
        (["--top-p", "1.5"], "top_p = 1.5: expected at most 1"),
        (["--max-tokens", "0"], "max_tokens = 0: expected at least 1"),
        (["--max-new-tokens", "4"], "did you mean '--max-tokens'?"),
    ],
)
def test_a_wrong_setting_of_generate(model: Path, flags: list[str], part: str) -> None:
    refused(small.run("generate", "--model", model, *flags), part)


def test_a_scratch_directory_on_tmpfs_is_said_in_one_line(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowtide.methods.buffers.is_memory", lambda directory: True)
    done = small.run(
        "bench", "step", "--model", model, "--seq-len", 16, "--steps", 1, "--block-inputs", "file",
        "--scratch-dir", tmp_path,
    )  # fmt: skip
    assert done.code == 0
    lines = [line for line in done.err.splitlines() if "tmpfs" in line]
    assert len(lines) == 1
    assert lines[0].startswith(f"lowtide: {tmp_path} is on tmpfs, which is memory")
