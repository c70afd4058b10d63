"""Tokenizers and chat templates of every kind that the families use, against transformers.

Ids, texts, renderings: the same directory, read by `AutoTokenizer` and by us. What is trained on
is decoded and read.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from family_tokenizers import CORPUS, Family, families
from trained import trained_ids

from lowtide.data.encode import Encoder
from lowtide.data.formats import ChatRecord
from lowtide.data.tokenizer import Tokenizer
from lowtide.data.turns import template_traits
from lowtide.errors import DataError

FAMILIES = dict(families())
SPECIALS = (
    "<s> a</s>[INST]  <|im_start|>user\n<|im_end|> <|endoftext|>\n\n<bos> <start_of_turn> x"
    "<end_of_turn>\n<|eot_id|>  <|end|>\n <|user|>\nHi<think>\n</think> <tool_call><unk><pad>"
)
AWKWARD = [
    *CORPUS,
    *("", " ", "  ", "   leading", "trailing   ", "\n", "\n\n\n", "\t\t", "\r\n\r\n", " \n \n "),
    "  two spaces   and\ttabs \n  then lines\r\n\r\n end  ",
    "emoji 👩🏽‍🚀🎉 👨‍👩‍👧‍👦 flags 🇸🇪 keycap 1️⃣ and e\u0301 combining",
    "\u0301lone \u0308\u0323 marks a\u0323\u0307 \u1112\u1161\u11ab \ufb01 Å \u212b",
    "漢字とかなカナ 한국어 العربية हिन्दी ไทย עברית",
    "def f(x):\n    return {'a': [1, 23, 456789]}  # 3.14159e-10\n\n\n\tif x != 0x1F:\n",
    "I'll we've CAN'T don't 1,234,567.89 2024-07-26T12:34:56Z",
    "\u00a0nbsp\u200bzero\u200djoin\ufeffbom \ufffd \u2028line \u3000wide",
    "\x00 nul\x01\x02\x1b[0m\x7f \x85\x0b\x0c",
    "▁lower ▁▁ block <0x41> <0xF0> Ġ Ċ",
    "\U0001f9d1 \U00010348 \U0010ffff \ue000",
    "a" * 3000,
    " " * 500 + "x" + "\n" * 300,
    "ab " * 700,
    "😀" * 200,
    SPECIALS,
]
CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": " 2+2? <|im_end|></s><end_of_turn><|eot_id|> "},
    {"role": "assistant", "content": "4."},
    {"role": "user", "content": "In kanji? 👩🏽‍🚀"},
    {"role": "assistant", "content": "四"},
]
SYSTEM = {"role": "system", "content": "Be brief."}
CALL: list[dict[str, Any]] = [
    CHAT[0],
    {"role": "assistant", "content": None,
     "tool_calls": [{"function": {"name": "sum", "arguments": {"é": [2, "<2>"]}}}]},
    {"role": "tool", "content": "4"},
    {"role": "assistant", "content": "It is 4."},
]  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": "sum", "description": "adds <tal> & 'så'"}}]


class Both:
    """One directory, read by us and by transformers."""

    def __init__(self, name: str, directory: Path) -> None:
        from transformers import AutoTokenizer

        self.name = name
        self.family: Family = FAMILIES[name]
        self.directory = self.family.write(directory)
        self.ours = Tokenizer.load(self.directory)
        self.theirs = AutoTokenizer.from_pretrained(str(self.directory))


@pytest.fixture(scope="module", params=FAMILIES)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Both:
    return Both(request.param, tmp_path_factory.mktemp("tokenizers") / request.param)


def test_ids_and_texts(both: Both) -> None:
    ours, theirs = both.ours, both.theirs
    for text in AWKWARD:
        for special in (True, False):
            ids = theirs.encode(text, add_special_tokens=special)
            assert ours.encode(text, add_special_tokens=special) == ids, text
            for skip in (True, False):
                assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip), text
    assert ours.vocab_size == len(theirs)
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    starts = theirs.encode("a")[0] == theirs.bos_token_id
    assert starts == (ours.encode("a")[0] == ours.bos_id)


def test_texts_come_back(both: Both) -> None:
    """Nothing is lost: bytes stand in for what the vocabulary does not hold.

    But for a leading space, which SentencePiece puts there itself and takes away again.
    """
    kept = [text for text in AWKWARD if text != SPECIALS and "<0x41>" not in text]
    if both.name.startswith("qwen"):
        kept = [text for text in kept if "\u0301" not in text]  # NFC is theirs by design
    for text in kept:
        found = both.ours.decode(both.ours.encode(text, False), False)
        assert found.lstrip(" ") == text.lstrip(" ")


def outcome(render: Any) -> Any:
    """What comes of it, or that it was refused."""
    try:
        return render()
    except Exception as error:
        return "refused: " + str(error).rpartition("messages: ")[2]


@pytest.mark.parametrize("prompted", [False, True])
@pytest.mark.parametrize("variables", [{}, {"enable_thinking": False}], ids=["", "no-thinking"])
def test_renderings(both: Both, prompted: bool, variables: dict[str, Any]) -> None:
    template = both.ours.template
    assert template is not None
    thought = {**CHAT[1], "reasoning_content": "hm\n"}
    think_inline = {**CHAT[1], "content": "<think>\nhm\n</think>\n\n4."}
    chats: list[tuple[list[dict[str, Any]], Any]] = [
        *((CHAT[:n], None) for n in (1, 2, 3, 4)),
        ([SYSTEM, *CHAT], None),
        ([{**SYSTEM, "content": "Be brief. /no_think"}, *CHAT], None),
        ([SYSTEM, CHAT[0]], None),
        ([CHAT[0], CHAT[0], CHAT[1]], None),
        ([CHAT[0], thought, *CHAT[2:]], None),
        ([CHAT[0], {**CHAT[1], "thinking": "hm"}], None),
        ([CHAT[0], think_inline, *CHAT[2:]], None),
        ([CHAT[0], think_inline], None),
        (CALL, TOOLS),
        (CHAT, TOOLS),
        (CALL[:2], None),
    ]
    refused = 0
    for messages, tools in chats:
        expected = outcome(
            lambda m=messages, t=tools: both.theirs.apply_chat_template(
                m, tools=t, add_generation_prompt=prompted, tokenize=False, **variables
            )
        )
        found = outcome(lambda m=messages, t=tools: template.render(m, prompted, t, variables))
        assert found == expected, messages
        if expected.startswith("refused"):
            refused += 1
            continue
        ids = both.theirs.apply_chat_template(
            messages, tools=tools, add_generation_prompt=prompted, return_dict=False, **variables
        )
        assert both.ours.encode(found, add_special_tokens=False) == ids
        bos = both.ours.bos_id
        if both.family.writes_bos:
            assert ids[0] == bos
            assert ids[1] != bos, "BOS is written once"
    assert refused < len(chats) - 5


@pytest.mark.parametrize("with_system", [False, True])
def test_what_is_trained_on(both: Both, with_system: bool) -> None:
    messages = [SYSTEM, *CHAT] if with_system else CHAT
    encoder = Encoder(both.ours, 10_000, 10_000, mask_prompt=True)
    if with_system and not both.family.takes_system:
        with pytest.raises(DataError) as raised:
            encoder.encode(ChatRecord("chats.jsonl, line 7", messages))
        assert "chats.jsonl, line 7: the chat template of" in str(raised.value)
        assert "System role not supported" in str(raised.value)
        assert "at the start of the first user message" in str(raised.value)
        return
    encoded = encoder.encode(ChatRecord("here", messages))
    rendered = both.theirs.apply_chat_template(messages, return_dict=False)
    assert encoded.ids == rendered
    runs = trained_ids(encoded)
    # One token may reach back over the header's last white space; the words are what counts.
    texts = [both.ours.decode(run, skip_special_tokens=False) for run in runs]
    assert [text.strip() for text in texts] == [text.strip() for text in both.family.trained]
    for run in runs:
        assert set(run) & both.ours.stop_ids, "the token that stops generation is learned"
        if both.name != "phi3":
            assert run[-1] in both.ours.stop_ids


CALLED = {
    "qwen3": (
        '<tool_call>\n{"name": "sum", "arguments": {"é": [2, "<2>"]}}\n</tool_call><|im_end|>',
        "It is 4.<|im_end|>",
        "<think>\n\n</think>\n\n四<|im_end|>",
    ),
    "llama3": (
        '{"name": "sum", "parameters": {"é": [2, "<2>"]}}<|eot_id|>',
        "It is 4.<|eot_id|>",
        "四<|eot_id|>",
    ),
}


@pytest.mark.parametrize("name", CALLED)
def test_calls_of_tools_are_trained_on_and_their_answers_are_not(name: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(FAMILIES[name].write(tmp_path / name))
    encoder = Encoder(tokenizer, 10_000, 10_000, mask_prompt=True)
    encoded = encoder.encode(ChatRecord("here", [*CALL, *CHAT[2:]], TOOLS))
    runs = trained_ids(encoded)
    assert tuple(tokenizer.decode(run, False) for run in runs) == CALLED[name]


@pytest.mark.parametrize(
    "answer",
    ["<think>\nhm\n</think>\n\n4.", "  4.\n", "<b>4</b>", "assistant\n", "<", "4.<|im_end|>"],
)
def test_awkward_answers_in_a_template_that_rewrites_turns(answer: str, tmp_path: Path) -> None:
    """Thinking is left out of earlier turns; nothing else is, and no prompt slips in."""
    tokenizer = Tokenizer.load(FAMILIES["qwen3"].write(tmp_path / "qwen3"))
    encoder = Encoder(tokenizer, 10_000, 10_000, mask_prompt=True)
    said = {"role": "assistant", "content": answer}
    chat = [{"role": "user", "content": answer}, said, CHAT[2], said, *CHAT[2:]]
    runs = trained_ids(encoder.encode(ChatRecord("here", chat)))
    kept = answer.rpartition("</think>\n\n")[2]
    expected = [f"{kept}<|im_end|>"] * 2 + ["<think>\n\n</think>\n\n四<|im_end|>"]
    assert [tokenizer.decode(run, False) for run in runs] == expected


def test_a_cut_off_conversation_learns_the_same_turns(both: Both) -> None:
    """Each turn alone, as the last of its record, trains on what it trains on in the whole."""
    encoder = Encoder(both.ours, 10_000, 10_000, mask_prompt=True)
    first = trained_ids(encoder.encode(ChatRecord("here", CHAT[:2])))
    whole = trained_ids(encoder.encode(ChatRecord("here", CHAT)))
    if both.name not in ("qwen3", "phi3"):  # thinking, or an end of text, after the last turn only
        assert first[0] == whole[0]
    else:
        assert len(first) == 1
        assert both.ours.decode(first[0], False) != both.ours.decode(whole[0], False)


def test_traits(both: Both) -> None:
    assert both.ours.template is not None
    traits = template_traits(both.ours.template)
    family = both.family
    assert traits.refuses is None
    assert traits.writes_bos == family.writes_bos
    assert traits.alternates == family.alternates
    assert traits.end_of_turn == family.end_of_turn
    system = "takes" if family.takes_system else "refuses"
    assert traits.system == ("leaves out" if both.name == "mistral" else system)
    assert traits.dated == ("strftime_now" in family.template)
    words = traits.words()
    assert f"ends a turn with {family.end_of_turn}" in words
    assert ("insists that user and assistant take turns" in words) == family.alternates


def test_todays_date_is_todays(both: Both) -> None:
    if not (both.ours.template and "strftime_now" in both.family.template):
        return
    assert str(datetime.now().year) in both.ours.render_chat(CHAT[:1])


@pytest.mark.parametrize(("name", "class_name"), [("smollm2", "GPT2Tokenizer"), ("qwen2", None)])
def test_the_file_is_believed_over_a_class_name(
    name: str, class_name: str | None, tmp_path: Path
) -> None:
    """transformers 5 builds some classes anew, and loses what only tokenizer.json says.

    A GPT2Tokenizer then no longer splits digits, and any tokenizer of a model of type qwen2 gets
    that family's pre-tokeniser. The model was trained with what tokenizer.json says.
    """
    from transformers import PreTrainedTokenizerFast

    family = FAMILIES[name]
    tokenizer = family.tokenizer if class_name else FAMILIES["granite"].tokenizer
    config = {"tokenizer_class": class_name} if class_name else {}
    directory = Family(family.model_type, tokenizer, config, "").write(tmp_path / "d")
    theirs = PreTrainedTokenizerFast.from_pretrained(str(directory))
    ours = Tokenizer.load(directory)
    for text in ["x\n\n42, 12345", *AWKWARD]:
        assert ours.encode(text) == theirs.encode(text)
