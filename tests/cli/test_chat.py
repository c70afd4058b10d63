"""`lowtide chat`, from a pipe and on a terminal."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import small

from lowtide.data.tokenizer import Tokenizer

POSITIONS = 512


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = tmp_path_factory.mktemp("talker")
    return small.write_small_model(directory, max_position_embeddings=POSITIONS)


def chat(lines: list[str], monkeypatch: pytest.MonkeyPatch, *flags: object) -> small.Outcome:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    return small.run("chat", "--max-tokens", 20, *flags)


def turns(done: small.Outcome) -> list[dict[str, str]]:
    assert done.code == 0, done.err
    found: list[dict[str, str]] = done.document["turns"]
    return found


def answered(model: Path, messages: list[dict[str, str]], *flags: object) -> str:
    """What `lowtide generate` goes on with after a rendered conversation, read anew."""
    text = Tokenizer.load(model).render_chat(messages, add_generation_prompt=True)
    done = small.run(
        "generate", "--model", model, "--prompt", text, "--chat-template", "none",
        "--max-tokens", 20, "--json", *flags,
    )  # fmt: skip
    return str(done.document["text"])


def test_every_answer_is_that_of_the_conversation_read_anew(
    talker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = ["The first", "and then?", "", "why?"]
    told = turns(chat(said, monkeypatch, "--model", talker, "--json"))
    assert [one["content"] for one in told[::2]] == ["The first", "and then?", "why?"]
    for place in range(1, len(told), 2):
        assert told[place]["role"] == "assistant"
        assert told[place]["content"] == answered(talker, told[:place])


def test_what_is_printed_is_the_answers(talker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = chat(["The first", "/nothing", "and then?"], monkeypatch, "--model", talker)
    told = turns(chat(["The first", "and then?"], monkeypatch, "--model", talker, "--json"))
    assert done.out == f"{told[1]['content']}\n{told[3]['content']}\n"
    assert "there is no /nothing; /help lists what there is." in done.err


def test_the_adapter_is_switched(
    model: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--model", model, "--adapter-path", adapter, "--json")
    user = [{"role": "user", "content": "ab"}]
    with_it, without = answered(model, user, "--adapter-path", adapter), answered(model, user)
    assert with_it != without
    off, on = ["/adapter off", "/reset", "ab"], ["/adapter on", "/reset", "ab"]
    for lines, expected in ((["ab"], with_it), (["ab", *off], without), ([*off, *on], with_it)):
        assert turns(chat(lines, monkeypatch, *flags))[1]["content"] == expected
    done = chat(["/adapter on", "/adapter maybe"], monkeypatch, "--model", model)
    assert done.err.count("there is no adapter: --adapter-path gives one.") == 2


def test_a_system_prompt(talker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system = {"role": "system", "content": "Be brief."}
    user = {"role": "user", "content": "The first"}
    expected = answered(talker, [system, user])
    flags = ("--model", talker, "--json")
    told = turns(chat(["The first"], monkeypatch, *flags, "--system", "Be brief."))
    assert told[1]["content"] == expected
    told = turns(chat(["other", "/system Be brief.", "The first"], monkeypatch, *flags))
    assert [one["content"] for one in told] == ["The first", expected]
    told = turns(chat(["/system Be brief.", "/system", "The first"], monkeypatch, *flags))
    assert told[1]["content"] == answered(talker, [user])


def test_what_no_longer_fits_is_left_out_and_said(
    talker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--model", talker, "--json", "--context", 200)
    said = [f"number {n} " + "x" * 40 for n in range(6)]
    done = chat(said, monkeypatch, *flags)
    told = turns(done)
    assert len(told) == 12
    assert "(the first 2 turns no longer fit, and are left out)" in done.err
    # What is left at the end: as many of the newest turns as fit beside 20 tokens of an answer.
    tokenizer = Tokenizer.load(talker)
    left = next(
        left for left in range(0, 12, 2)
        if len(tokenizer.encode(tokenizer.render_chat(told[left:11], True), False)) <= 180
    )  # fmt: skip
    assert f"(the first {left} turns no longer fit" in done.err
    assert told[11]["content"] == answered(talker, told[left:11])


def test_a_message_that_is_too_long_is_refused_and_nothing_is_lost(
    talker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = ["The first", "x" * 600, "and then?"]
    done = chat(said, monkeypatch, "--model", talker, "--json")
    told = turns(done)
    assert [one["content"] for one in told[::2]] == ["The first", "and then?"]
    assert told[3]["content"] == answered(talker, told[:3])
    assert "tokens, and there is room for 492 of the context's 512" in done.err


def test_a_model_without_a_template(talker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = chat(["x"], monkeypatch, "--model", talker, "--chat-template", "none")
    assert done.code == 2
    assert "Pass one with --chat-template FILE (Jinja), or use `lowtide generate`." in done.err


class Terminal:
    """The user's end of a terminal."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor, self._seen = descriptor, ""

    def until(self, text: str, press: bytes = b"") -> None:
        """Read up to a text; what follows it is left for the next one."""
        left = 30 if press else 1
        while text not in self._seen:
            os.write(self.descriptor, press)
            ready = select.select([self.descriptor], [], [], 2 if press else 60)[0]
            left -= not ready
            if left and not ready:
                continue
            assert ready, f"nothing more came after {self._seen!r}"
            self._seen += os.read(self.descriptor, 4096).decode(errors="replace")
        self._seen = self._seen.partition(text)[2]

    def some(self, count: int) -> None:
        """Read so many characters, whatever they are."""
        while len(self._seen) < count:
            self._seen += os.read(self.descriptor, 4096).decode(errors="replace")
        self._seen = ""


def test_ctrl_c_stops_the_answer_and_not_the_program(tmp_path: Path) -> None:
    # No token ends an answer, and 100,000 would take minutes: it ends because it is stopped.
    model = small.write_small_model(tmp_path / "m", max_position_embeddings=200_000)
    settings = {"chat_template": "{{ messages[-1]['content'] }}"}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    assert not Tokenizer.load(model).stop_ids
    outer, inner = pty.openpty()
    terminal = Terminal(outer)
    arguments: list[Any] = ["chat", "--model", model, "--context", 150_000, "--temperature", 1]
    process = subprocess.Popen(
        small.command(*arguments, "--max-tokens", 100_000),
        stdin=inner, stdout=inner, stderr=inner, env=small.environment(), start_new_session=True,
        preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(inner)
    try:
        terminal.until("> ")
        os.write(outer, b"hello\n")
        terminal.until("hello\r\n")
        terminal.some(300)  # more than what readline sends: the answer has begun
        os.write(outer, b"\x03")
        terminal.until("(stopped)")
        terminal.until("> ")
        # Python's readline does not see a signal between the prompt and its select: press again.
        terminal.until("(Ctrl-D or /quit ends)", press=b"\x03")
        os.write(outer, b"/reset\n")
        terminal.until("The conversation begins again.")
        terminal.until("> ")
        os.write(outer, b"\x04")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(outer)


def test_lines_from_a_pipe(talker: Path) -> None:
    done = subprocess.run(
        small.command("chat", "--model", talker, "--max-tokens", 5, "--json"),
        input=b"one\n\xff\xfe\n/quit\nnever\n", capture_output=True, check=False, timeout=120,
        env=small.environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [one["content"] for one in json.loads(done.stdout)["turns"]][::2] == ["one"]
    assert b"half of a surrogate pair" in done.stderr
