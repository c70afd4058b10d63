"""What is trained on, read back as text; and the ids, against transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from trained import trained_ids

from lowtide.data.encode import Encoded, Encoder
from lowtide.data.formats import (
    ChatRecord,
    InstructionRecord,
    PromptRecord,
    Record,
    TextRecord,
    iter_records,
)
from lowtide.data.templates import ChatTemplate
from lowtide.data.tokenizer import Tokenizer
from lowtide.errors import ConfigError, DataError

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4."},
    {"role": "user", "content": "In kanji? 🙂"},
    {"role": "assistant", "content": "四\n"},
]


def encoder(tokenizer: Tokenizer, mask: bool = True, length: int = 1000) -> Encoder:
    return Encoder(tokenizer, length, 200_000, mask)


def trained_runs(tokenizer: Tokenizer, encoded: Encoded) -> list[str]:
    """The text of each unbroken run of trained tokens."""
    return [tokenizer.decode(run, skip_special_tokens=False) for run in trained_ids(encoded)]


def test_each_assistant_turn_is_trained_on(qwen: Tokenizer, tiny: Tokenizer) -> None:
    for tokenizer in (qwen, tiny):
        encoded = encoder(tokenizer).encode(ChatRecord("here", CHAT))
        assert trained_runs(tokenizer, encoded) == ["4.<|im_end|>", "四\n<|im_end|>"]
        whole = encoder(tokenizer, mask=False).encode(ChatRecord("here", CHAT))
        assert whole.ids == encoded.ids
        assert set(whole.trained) == {1}


def test_tool_calls_are_trained_on_and_answers_are_not(qwen: Tokenizer) -> None:
    call = {"function": {"name": "f", "arguments": {"x": 1}}}
    messages = [
        {"role": "user", "content": "Call f"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "seven"},
        {"role": "assistant", "content": "It is 7."},
    ]
    tools = [{"type": "function", "function": {"name": "f"}}]
    encoded = encoder(qwen).encode(ChatRecord("here", messages, tools))
    (first, second) = trained_runs(qwen, encoded)
    assert '"name": "f"' in first
    assert first.endswith("</tool_call><|im_end|>")
    assert "seven" not in first + second
    assert second == "It is 7.<|im_end|>"
    assert "# Tools" in qwen.decode(encoded.ids)


def test_ids_and_labels_equal_transformers_on_real_data(
    qwen: Tokenizer, qwen_directory: Path, asset: Callable[[str], Path]
) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(qwen_directory))
    turns: list[tuple[Record, str, str]] = []
    for record in iter_records(asset("data/gsm8k/test.jsonl")):
        assert isinstance(record, PromptRecord)
        turns.append((record, record.prompt, record.completion))
    for name in ("alpaca_en_demo", "identity"):
        for record in iter_records(asset(f"data/alpaca_en_demo/{name}.json")):
            assert isinstance(record, InstructionRecord)
            prompt = record.instruction + ("\n\n" + record.input if record.input else "")
            turns.append((record, prompt, record.output))
    with_input = [turn for turn in turns if "\n\n" in turn[1]]
    assert len(with_input) > 20
    for record, prompt, completion in turns[::40] + with_input[:20] + turns[-5:]:
        encoded = encoder(qwen, length=10_000).encode(record)
        messages = [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": completion},
        ]
        expected = theirs.apply_chat_template(messages, return_dict=False)
        header = theirs.apply_chat_template(
            messages[:1], add_generation_prompt=True, return_dict=False
        )
        assert encoded.ids == expected
        # The last token is the newline after <|im_end|>, which nobody generates.
        assert encoded.trained[:-1] == [0] * len(header) + [1] * (len(expected) - len(header) - 1)
        assert encoded.trained[-1] == 0


def test_prompt_and_completion_without_a_template(tiny_plain: Tokenizer) -> None:
    record = PromptRecord("here", "Färg: ", "blå")
    encoded = encoder(tiny_plain).encode(record)
    assert tiny_plain.decode(encoded.ids, False) == "Färg: blå<eos>"
    assert trained_runs(tiny_plain, encoded) == ["blå<eos>"]
    assert set(encoder(tiny_plain, mask=False).encode(record).trained) == {1}


def test_bos_and_a_token_across_the_boundary(stories: Tokenizer) -> None:
    encoded = encoder(stories).encode(PromptRecord("here", "Once upon a ti", "me, there was"))
    ids, offsets = stories.encode_with_offsets("Once upon a time, there was")
    assert encoded.ids == [*ids, 2]
    assert encoded.trained[0] == 0, "BOS is not part of a completion"
    assert encoded.trained == [int(end > 14) for _, end in offsets] + [1]
    across = next(i for i, (start, end) in enumerate(offsets) if start < 14 < end)
    assert encoded.trained[across] == 1, "no character of the completion may be left out"


def test_a_tokenizer_that_ends_texts_itself(tiny_plain: Tokenizer) -> None:
    eos = tiny_plain.eos_id
    tiny_plain._backend.post_processor = TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", eos)]
    )
    encoded = encoder(tiny_plain).encode(PromptRecord("here", "ab", "cd"))
    assert encoded.ids.count(eos) == 1
    assert trained_runs(tiny_plain, encoded) == ["cd<eos>"]


def test_a_template_writes_bos_itself(stories: Tokenizer) -> None:
    source = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    template = ChatTemplate(source, {"bos_token": "<s>"})
    tokenizer = Tokenizer(stories._backend, stories._settings, template)
    for mask in (True, False):
        ids = encoder(tokenizer, mask).encode(ChatRecord("here", CHAT[:3])).ids
        assert ids[0] == 1
        assert ids.count(1) == 1


def test_alpaca_without_a_template(tiny_plain: Tokenizer) -> None:
    encoded = encoder(tiny_plain).encode(InstructionRecord("here", "Add", "{1} 2", "3"))
    assert tiny_plain.decode(encoded.ids, False) == (
        "Below is an instruction that describes a task, paired with an input that provides "
        "further context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd\n\n### Input:\n{1} 2\n\n### Response:\n3<eos>"
    )
    assert trained_runs(tiny_plain, encoded) == ["3<eos>"]
    encoded = encoder(tiny_plain).encode(InstructionRecord("here", "Say", "", "A"))
    assert tiny_plain.decode(encoded.ids, False) == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nSay\n\n### Response:\nA<eos>"
    )


def test_text_ends_with_one_eos(tiny: Tokenizer, stories: Tokenizer) -> None:
    plain = encoder(tiny, mask=False)
    assert tiny.decode(plain.encode(TextRecord("here", "a b")).ids, False) == "a b<eos>"
    assert tiny.decode(plain.encode(TextRecord("here", "a<eos>")).ids, False) == "a<eos>"
    ids = encoder(stories, mask=False).encode(TextRecord("here", "Once")).ids
    assert ids == [1, *stories.encode("Once", add_special_tokens=False), 2]


def test_text_has_nothing_to_mask(tiny: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"line 3: --mask-prompt needs prompts to mask"):
        encoder(tiny).encode(TextRecord("f.jsonl, line 3", "a"))
    with pytest.raises(ConfigError, match=r"f\.txt: --mask-prompt needs prompts to mask"):
        list(encoder(tiny).windows("a", Path("f.txt")))


def test_chat_without_a_template(tiny_plain: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"^f, line 3: a conversation needs .*--chat-template FILE"):
        encoder(tiny_plain).encode(ChatRecord("f, line 3", CHAT))


def with_template(tokenizer: Tokenizer, source: str) -> Tokenizer:
    tokenizer.template = ChatTemplate(source, {"eos_token": "<eos>"}, "its template")
    return tokenizer


def test_templates_whose_end_marker_follows_white_space_or_is_none(tiny: Tokenizer) -> None:
    inst = (
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% elif m.role == 'assistant' %} {{ m.content }} {{ eos_token }}\n{% endif %}{% endfor %}"
    )
    encoded = encoder(with_template(tiny, inst)).encode(ChatRecord("here", CHAT[1:4]))
    assert trained_runs(tiny, encoded) == [" 4. <eos>"]
    # With no marker, the blank line is what tells a model to stop.
    lines = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}{% if "
    lines += "add_generation_prompt %}assistant: {% endif %}"
    encoded = encoder(with_template(tiny, lines)).encode(ChatRecord("here", CHAT[1:4]))
    assert trained_runs(tiny, encoded) == ["4.\n\n"]


def test_a_template_that_rewrites_earlier_turns(tiny: Tokenizer) -> None:
    source = (
        "{% for m in messages %}{{ m.role }}:"
        "{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}"
        "{{ m.content }};{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    tokenizer = with_template(tiny, source)
    encoded = encoder(tokenizer).encode(ChatRecord("here", CHAT))
    assert trained_runs(tokenizer, encoded) == ["4.;", "<think></think>四\n;"]
    assert encoder(tokenizer, mask=False).encode(ChatRecord("here", CHAT)).trained_tokens > 0


def test_a_template_that_scrambles_turns(tiny: Tokenizer) -> None:
    """Words upside down are found nowhere: refused, not trained on at random."""
    source = "{% for m in messages | reverse %}{{ m.content | reverse }}{% endfor %}"
    tokenizer = with_template(tiny, source)
    with pytest.raises(DataError, match=r"here: prompts cannot be masked: its template writes me"):
        encoder(tokenizer).encode(ChatRecord("here", CHAT))


def test_a_template_that_refuses(tiny: Tokenizer) -> None:
    tokenizer = with_template(tiny, "{{ raise_exception('System role not supported') }}")
    with pytest.raises(DataError, match=r"here: its template refuses .*System role not supported"):
        encoder(tokenizer).encode(ChatRecord("here", CHAT))


def test_too_long_is_cut_at_the_end(tiny_plain: Tokenizer) -> None:
    record = PromptRecord("here", "abc", "defg")  # and EOS: 8 tokens
    encoded = encoder(tiny_plain, length=5).encode(record)
    assert tiny_plain.decode(encoded.ids) == "abcde"
    assert (encoded.trained, encoded.dropped_tokens) == ([0, 0, 0, 1, 1], 3)
    assert encoder(tiny_plain, length=3).encode(record).trained_tokens == 0
    assert encoder(tiny_plain, length=8).encode(record).dropped_tokens == 0
    with pytest.raises(ConfigError, match="max_seq_length is 1; expected at least 2"):
        encoder(tiny_plain, length=1)


def test_the_first_token_is_never_predicted() -> None:
    assert Encoded([1, 2], [1, 0], 0).trained_tokens == 0
    assert Encoded([1, 2], [1, 1], 0).trained_tokens == 1


def test_windows_are_the_whole_text(stories: Tokenizer, asset: Callable[[str], Path]) -> None:
    text = asset("data/wizard_of_oz/wizard_of_oz.txt").read_text(encoding="utf-8")
    windows = list(encoder(stories, mask=False, length=100).windows(text, Path("oz.txt")))
    assert [i for window in windows for i in window.ids] == stories.encode(text)
    assert {len(window.ids) for window in windows[:-1]} == {100}
    assert len(windows[-1].ids) == 139_392 % 100


def test_a_last_window_of_one_token(tiny: Tokenizer) -> None:
    def windows(text: str) -> list[Encoded]:
        return list(encoder(tiny, mask=False, length=4).windows(text, Path("f.txt")))

    assert [len(w.ids) for w in windows("abcdef")] == [4, 2]
    assert [(len(w.ids), w.dropped_tokens) for w in windows("abcde")] == [(4, 0), (0, 1)]


def test_a_tokenizer_of_another_model(qwen: Tokenizer, tiny: Tokenizer) -> None:
    record = ChatRecord("f, line 7", CHAT)
    with pytest.raises(
        DataError, match=r"line 7: tokenizer and model do not match: token '.*' has"
    ):
        Encoder(qwen, 100, 32_000).encode(record)
    ids = tiny.encode("abc", False)
    Encoder(tiny, 100, max(ids) + 1).windows("abc", Path("f.txt"))
    with pytest.raises(DataError, match=rf"f\.txt: .* has id {max(ids)}, and the model has"):
        list(Encoder(tiny, 100, max(ids)).windows("abc", Path("f.txt")))


def test_flags_survive_normalisation(qwen: Tokenizer) -> None:
    """NFC makes one character of two; the boundary is still where the text has it."""
    qwen_plain: Any = Tokenizer(qwen._backend, qwen._settings)
    encoded = encoder(qwen_plain).encode(PromptRecord("here", "cafe\u0301 e\u0301:", " ja"))
    assert trained_runs(qwen_plain, encoded) == [" ja<|im_end|>"]
    assert json.dumps(encoded.ids)
