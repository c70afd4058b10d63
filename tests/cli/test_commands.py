"""Every command, done right: what it prints, what it writes, its one JSON document."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import small
import yaml

from lowtide.cli.main import COMMANDS

STEP_KEYS = {
    "step", "loss", "n_tokens", "wall_s", "cpu_s", "tokens_per_s", "peak_anon_bytes",
    "peak_rss_bytes", "peak_file_bytes", "disk_read_bytes", "learning_rate", "grad_norm",
    "grad_norms", "total_tokens", "elapsed_s",
}  # fmt: skip


def test_train_says_what_it_does_and_writes_its_files(
    model: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "new" / "adapter"
    done = small.run(
        "train", "--model", model, "--data", data, "--adapter-path", out, "--iters", 5,
        "--max-seq-length", 32, "--valid-records", 4, "--steps-per-eval", 2, "--save-every", 2,
        "--steps-per-report", 2, "--batch-size", 3,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.err == ""
    assert set(os.listdir(out)) == {
        "adapter_model.safetensors", "adapter_config.json", "run.yaml", "metrics.jsonl",
        "events.jsonl", "checkpoints", "best",
    }  # fmt: skip
    lines = done.out.splitlines()
    assert lines[0].startswith(f"model    {model} (llama, 22,432 parameters, float32 mapped")
    assert "LoRA r=8 on q_proj, k_proj" in lines[1]
    assert lines[2].startswith("train    20 records")
    assert lines[3].startswith("valid    4 records")
    told = [line.split("  ")[0].split(":")[0] for line in lines[4:-7]]
    assert told == [
        "step 0/5", "step 1/5", "step 2/5", "step 2/5", "step 2",
        "step 4/5", "step 4/5", "step 4", "step 5/5", "step 5/5", "step 5",
    ]  # fmt: skip
    assert "done: 5 updates" in done.out
    assert [line.split()[0] for line in lines[-6:-2]] == ["took", "memory", "files", "next"]
    here = f"--model {model} --adapter-path {out}"
    assert lines[-3] == f'next     lowtide generate {here} --prompt "..."'
    assert lines[-2].strip() == f"lowtide eval {here} --data {data} --max-seq-length 32"
    assert lines[-1].strip() == f"lowtide report {out}"
    for line in lines[-2:]:
        assert small.run(*line.split()[1:]).code == 0


def test_metrics_has_a_line_for_each_update_and_each_validation(
    model: Path, data: Path, tmp_path: Path
) -> None:
    done = small.run(
        "train", "--model", model, "--data", data, "--adapter-path", tmp_path / "out",
        "--iters", 4, "--max-seq-length", 32, "--valid-records", 4, "--steps-per-eval", 3,
        "--max-grad-norm", 1, "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    text = (tmp_path / "out" / "metrics.jsonl").read_text()
    entries = [json.loads(line) for line in text.splitlines()]
    kinds = [("valid" if "valid_loss" in e else "step", e["step"]) for e in entries]
    assert kinds == [
        ("valid", 0), ("step", 1), ("step", 2), ("step", 3), ("valid", 3), ("step", 4),
        ("valid", 4),
    ]  # fmt: skip
    steps = [entry for entry in entries if "valid_loss" not in entry]
    assert all(set(entry) - {"temperature_c"} == STEP_KEYS for entry in steps)
    assert all(entry["grad_norm"] > 0 and entry["tokens_per_s"] > 0 for entry in steps)
    result = done.document
    assert result["steps"] == 4
    assert result["interrupted"] is False
    assert result["loss"] == steps[-1]["loss"]
    assert result["valid_loss"] == entries[-1]["valid_loss"]
    assert result["n_tokens"] == sum(entry["n_tokens"] for entry in steps)
    assert result["peak_anon_bytes"] == max(entry["peak_anon_bytes"] for entry in steps)
    assert result["adapter_path"] == str(tmp_path / "out")
    assert "step 4" in done.err  # people's text goes to stderr


def test_the_saved_settings_repeat_the_run(model: Path, data: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    done = small.run(
        "train", "--model", model, "--data", data, "--adapter-path", first, "--iters", 3,
        "--max-seq-length", 32, "--lora-dropout", 0.2, "--target-modules", "q_proj,down_proj",
        "--seed", 7, "--weight-decay", 1e-5, "--batch-size", 2, "--learning-rate", 1e-2,
    )  # fmt: skip
    assert done.code == 0, done.err
    saved = yaml.safe_load((first / "run.yaml").read_text())
    assert next(iter(saved)) == "model"
    assert saved["learning_rate"] == 0.01
    assert saved["target_modules"] == "q_proj,down_proj"
    again = small.run("train", "--config", first / "run.yaml", "--adapter-path", second)
    assert again.code == 0, again.err
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_eval_prints_loss_perplexity_and_tokens(model: Path, data: Path, adapter: Path) -> None:
    base = ("eval", "--model", model, "--data", data, "--max-seq-length", 32)
    plain, adapted = (
        small.run(*base, "--json"),
        small.run(*base, "--json", "--adapter-path", adapter),
    )
    for done in (plain, adapted):
        assert done.code == 0, done.err
        assert set(done.document) == {"loss", "perplexity", "n_tokens"}
        assert done.document["perplexity"] == pytest.approx(math.exp(done.document["loss"]))
        assert done.document["n_tokens"] == 24 * 31
    assert adapted.document["loss"] < plain.document["loss"]
    text = small.run(*base).out
    assert f"loss {plain.document['loss']:.4f} nats per token" in text
    assert "744 tokens" in text


def test_eval_does_not_depend_on_the_batch_size(model: Path, data: Path, adapter: Path) -> None:
    base = ("eval", "--model", model, "--adapter-path", adapter, "--data", data, "--json")
    found = [
        small.run(*base, "--max-seq-length", 50, "--batch-size", size).document
        for size in (1, 5, 24, 1000)
    ]
    for other in found[1:]:
        assert other["n_tokens"] == found[0]["n_tokens"]
        assert other["loss"] == pytest.approx(found[0]["loss"], rel=1e-6)


def test_eval_of_a_directory_takes_test_then_valid(model: Path, tmp_path: Path) -> None:
    for name, count in (("train", 9), ("valid", 3), ("test", 2)):
        small.write_jsonl(tmp_path / f"{name}.jsonl", [{"text": "one two"}] * count)
    base = ("eval", "--model", model, "--data", tmp_path, "--max-seq-length", 32)
    assert "data  2 records" in small.run(*base).out
    (tmp_path / "test.jsonl").unlink()
    assert "data  3 records" in small.run(*base).out
    (tmp_path / "valid.jsonl").unlink()
    outcome = small.run(*base)
    assert outcome.code == 2
    assert "holds no test.jsonl or valid.jsonl" in outcome.err


def test_generate_streams_what_its_document_says(model: Path, adapter: Path) -> None:
    base = ("generate", "--model", model, "--adapter-path", adapter, "--prompt", "One, two")
    sampled = ("--max-tokens", 40, "--temperature", 1.5, "--seed", 3)
    document = small.run(*base, *sampled, "--json")
    assert document.code == 0, document.err
    assert set(document.document) == {"text", "n_tokens"}
    assert 0 < document.document["n_tokens"] <= 40
    assert document.err == document.document["text"] + "\n"
    assert small.run(*base, *sampled).out == document.document["text"] + "\n"
    other = small.run(*base, "--max-tokens", 40, "--temperature", 1.5, "--seed", 4, "--json")
    assert other.document["text"] != document.document["text"]


def test_generate_stops_where_the_models_positions_end(model: Path) -> None:
    base = ("generate", "--model", model, "--chat-template", "none", "--json", "--temperature", 2)
    counts = [
        small.run(*base, "--prompt", "x" * 60, "--max-tokens", 50, "--seed", seed).document
        for seed in range(4)
    ]
    # 60 tokens of prompt leave 4 positions, and the last token needs none: nothing follows it.
    assert max(document["n_tokens"] for document in counts) == 5


def test_info_takes_the_model_as_its_first_word(model: Path) -> None:
    by_word, by_flag = small.run("info", model, "--json"), small.run("info", "--model", model)
    assert by_word.code == by_flag.code == 0
    document = by_word.document
    assert document["model_type"] == "llama"
    assert document["n_parameters"] == 22_432
    assert document["bytes_on_disk"] == (model / "model.safetensors").stat().st_size
    for part in ("22,432", "4 heads of 8, 2 of keys and values", "264 tokens", "float32: "):
        assert part in by_flag.out


def test_bench_step_reports_the_median_and_every_step(model: Path) -> None:
    done = small.run("bench", "step", "--model", model, "--seq-len", 16, "--steps", 2, "--json")
    assert done.code == 0, done.err
    document = done.document
    named = {
        "method", "seq_len", "steps", "peak_anon_bytes", "peak_rss_bytes", "peak_file_bytes",
        "disk_read_bytes", "wall_s", "cpu_s", "tokens_per_s", "gemm_utilization",
    }  # fmt: skip
    assert named <= set(document)
    assert (document["method"], document["seq_len"], len(document["steps"])) == ("mesp", 16, 2)
    assert isinstance(document["peak_anon_bytes"], int)
    assert "median" in done.err


@pytest.mark.parametrize(
    "words", [[name] for name in COMMANDS if name != "bench"] + [["bench", "step"]]
)
def test_help_of_every_command(words: list[str]) -> None:
    done = small.run(*words, "--help")
    assert done.code == 0
    assert done.out.startswith(f"usage: lowtide {' '.join(words)}")
    assert "--json" in done.out
    assert "--config" in done.out
    assert done.err == ""


def test_a_config_file_sets_what_flags_do(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "generate.yaml"
    file.write_text(f"model: {model}\nprompt: One\nmax-tokens: 3\ntemperature: 1.0\n")
    by_file = small.run("generate", "--config", file, "--json")
    by_flags = small.run(
        "generate", "--model", model, "--prompt", "One", "--max-tokens", 3, "--temperature", 1.0,
        "--json",
    )  # fmt: skip
    assert by_file.document == by_flags.document


def test_chat_and_masked_data_train_through_the_template(model: Path, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    data = small.write_jsonl(tmp_path / "chat.jsonl", [{"messages": chat}] * 3)
    base = ("train", "--model", model, "--data", data, "--iters", 1, "--json")
    whole = small.run(*base, "--adapter-path", tmp_path / "a", "--max-seq-length", 64)
    masked = small.run(
        *base, "--adapter-path", tmp_path / "b", "--max-seq-length", 64, "--mask-prompt"
    )
    # S and E stand for the marks of ChatML, one token each as every other character is.
    assert whole.document["n_tokens"] == len("Suser\nHiE\nSassistant\nHelloE\n") - 1
    assert masked.document["n_tokens"] == len("HelloE")
