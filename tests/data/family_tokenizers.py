"""Small tokenizers of the kinds that the families use, with chat templates of their structure.

Each has the pipeline (normaliser, pre-tokeniser, post-processor, added tokens) and the files of
its family's repositories, and a vocabulary trained here on a few lines. The templates are ours,
written after the published ones: the same roles, markers, refusals and special cases.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

CORPUS = [
    "Once upon a time, there was a little girl who could write def f(x): return x + 1 in C.",
    "The answer is 12345, and the question was never asked; you are a helpful assistant.",
    "user system assistant model tool think no_think [INST] <<SYS>> Today Date: 26 Jul 2024",
    "日本語の文章 и немного по-русски, été naïve façade — “quotes”… \n\n    indented\ttabs",
]
_SPACE = "\u2581"
_GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN = _GPT4.replace(r"\p{N}{1,3}", r"\p{N}")


@dataclass(frozen=True)
class Family:
    """One model directory's worth of tokenizer files."""

    model_type: str
    tokenizer: Tokenizer
    config: dict[str, Any]
    template: str
    files: dict[str, Any] = field(default_factory=dict)
    takes_system: bool = True
    alternates: bool = False
    writes_bos: bool = True
    end_of_turn: str = ""
    trained: tuple[str, str] = ("", "")
    """What is trained on where the assistant says "4." and then "四" (the second is last)."""

    def write(self, directory: Path) -> Path:
        directory.mkdir(parents=True)
        self.tokenizer.save(str(directory / "tokenizer.json"))
        config = {"model_type": self.model_type}
        more = {"tokenizer_config.json": self.config, "config.json": config, **self.files}
        for name, content in more.items():
            (directory / name).write_text(json.dumps(content))
        (directory / "chat_template.jinja").write_text(self.template)
        return directory


def _special(*names: str, **flags: Any) -> list[AddedToken]:
    return [AddedToken(name, special=True, normalized=False, **flags) for name in names]


def _sentencepiece(specials: list[str], prefix: bool) -> Tokenizer:
    """BPE over text whose spaces are marks, with a token for each byte it does not know."""
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False, special_tokens=["<unk>"])
    draft = Tokenizer(models.BPE(unk_token="<unk>"))
    draft.normalizer = normalizers.Replace(" ", _SPACE)
    draft.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, "never")
    draft.train_from_iterator(CORPUS, trainer)
    trained = json.loads(draft.to_str())["model"]
    names = ["<unk>", *specials, *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces = sorted(trained["vocab"], key=trained["vocab"].__getitem__)
    names += [piece for piece in pieces if piece not in names]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={name: i for i, name in enumerate(names)},
            merges=[tuple(merge) for merge in trained["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    replace = normalizers.Replace(" ", _SPACE)
    if prefix:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replace])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = replace
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(_special("<unk>", *specials))
    return tokenizer


def _byte_level(specials: list[str], pattern: str | None, digits: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    first: Any = pre_tokenizers.Digits(individual_digits=True)
    if pattern is not None:
        first = pre_tokenizers.Split(Regex(pattern), "isolated")
    stages = [first, byte_level] if digits or pattern is not None else [byte_level]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(stages)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, show_progress=False, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(_special(*specials))
    return tokenizer


def _starts_with(tokenizer: Tokenizer, bos: str, byte_level: bool = False) -> Tokenizer:
    start = processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos}:1 $B:1",
        special_tokens=[(bos, tokenizer.token_to_id(bos))],
    )
    stages: list[Any] = [processors.ByteLevel(trim_offsets=False), start]
    tokenizer.post_processor = processors.Sequence(stages) if byte_level else start
    return tokenizer


def _decoder(tokenizer: Tokenizer, **changed: dict[str, bool]) -> dict[str, Any]:
    """`added_tokens_decoder` as repositories write it."""
    return {
        str(i): {
            "content": token.content,
            "lstrip": token.lstrip,
            "normalized": token.normalized,
            "rstrip": token.rstrip,
            "single_word": token.single_word,
            "special": token.special,
            **changed.get(token.content, {}),
        }
        for i, token in sorted(tokenizer.get_added_tokens_decoder().items())
    }


CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
    "{% set system = messages[0]['content'] %}{% else %}{% set rest = messages %}"
    "{% set system = false %}{% endif %}{% for m in rest %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception("
    "'Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system != false %}"
    "{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + m['content'] %}"
    "{% else %}{% set content = m['content'] %}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
_ZEPHYR = (
    "{% for m in messages %}\n{% if m['role'] == 'user' %}\n{{ '<|user|>\\n' + m['content'] + "
    "eos_token }}\n{% elif m['role'] == 'system' %}\n{{ '<|system|>\\n' + m['content'] + "
    "eos_token }}\n{% elif m['role'] == 'assistant' %}\n{{ '<|assistant|>\\n'  + m['content'] + "
    "eos_token }}\n{% endif %}\n{% if loop.last and add_generation_prompt %}\n"
    "{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
_LLAMA3 = (
    "{{- bos_token }}\n"
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    '{%- set date_string = strftime_now("%d %b %Y") %}{%- else %}'
    '{%- set date_string = "26 Jul 2024" %}{%- endif %}{%- endif %}\n'
    "{%- if messages[0]['role'] == 'system' %}"
    "{%- set system_message = messages[0]['content']|trim %}{%- set messages = messages[1:] %}"
    '{%- else %}{%- set system_message = "" %}{%- endif %}\n'
    '{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}\n'
    "{%- if tools is not none %}{{- 'Environment: ipython\\n' }}"
    '{%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}{%- endif %}\n'
    '{{- "Today Date: " + date_string + "\\n\\n" }}{{- system_message }}{{- "<|eot_id|>" }}\n'
    "{%- for m in messages %}\n"
    "{%- if not (m.role == 'ipython' or m.role == 'tool' or 'tool_calls' in m) %}\n"
    "{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n'+ m['content'] | trim + "
    "'<|eot_id|>' }}\n"
    "{%- elif 'tool_calls' in m %}\n"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
    "{%- set call = m.tool_calls[0].function %}"
    '{{- \'{"name": "\' + call.name + \'", "parameters": \' }}{{- call.arguments | tojson }}'
    "{{- '}' }}{{- '<|eot_id|>' }}\n"
    "{%- else %}\n{{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' }}"
    "{{- m.content if m.content is string else m.content | tojson }}{{- '<|eot_id|>' }}\n"
    "{%- endif %}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
    "{%- endif %}\n"
)
_QWEN3 = (
    "{%- if tools %}{{- '<|im_start|>system\\n' }}{%- if messages[0].role == 'system' %}"
    "{{- messages[0].content + '\\n\\n' }}{%- endif %}{{- '# Tools\\n<tools>' }}"
    "{%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}"
    "{{- '\\n</tools><|im_end|>\\n' }}{%- elif messages[0].role == 'system' %}"
    "{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{%- endif %}\n"
    "{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}\n"
    "{%- for message in messages[::-1] %}{%- set index = (messages|length - 1) - loop.index0 %}"
    "{%- if ns.multi_step_tool and message.role == 'user' and message.content is string and not"
    "(message.content.startswith('<tool_response>')) %}{%- set ns.multi_step_tool = false %}"
    "{%- set ns.last_query_index = index %}{%- endif %}{%- endfor %}\n"
    "{%- for message in messages %}"
    "{%- set content = message.content if message.content is string else '' %}\n"
    "{%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}"
    "{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}\n"
    "{%- elif message.role == 'assistant' %}{%- set reasoning_content = '' %}"
    "{%- if message.reasoning_content is string %}"
    "{%- set reasoning_content = message.reasoning_content %}"
    "{%- elif '</think>' in content %}"
    "{%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1]"
    ".lstrip('\\n') %}{%- set content = content.split('</think>')[-1].lstrip('\\n') %}"
    "{%- endif %}\n"
    "{%- if loop.index0 > ns.last_query_index and (loop.last or reasoning_content) %}"
    "{{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + "
    "'\\n</think>\\n\\n' + content.lstrip('\\n') }}"
    "{%- else %}{{- '<|im_start|>' + message.role + '\\n' + content }}{%- endif %}\n"
    "{%- if message.tool_calls %}{%- for call in message.tool_calls %}"
    "{%- if (loop.first and content) or (not loop.first) %}{{- '\\n' }}{%- endif %}"
    "{%- if call.function %}{%- set call = call.function %}{%- endif %}"
    '{{- \'<tool_call>\\n{"name": "\' }}{{- call.name }}{{- \'", "arguments": \' }}'
    "{{- call.arguments | tojson }}{{- '}\\n</tool_call>' }}{%- endfor %}{%- endif %}"
    "{{- '<|im_end|>\\n' }}\n"
    "{%- elif message.role == 'tool' %}"
    "{%- if loop.first or (messages[loop.index0 - 1].role != 'tool') %}"
    "{{- '<|im_start|>user' }}{%- endif %}"
    "{{- '\\n<tool_response>\\n' }}{{- content }}{{- '\\n</tool_response>' }}"
    "{%- if loop.last or (messages[loop.index0 + 1].role != 'tool') %}{{- '<|im_end|>\\n' }}"
    "{%- endif %}{%- endif %}{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"
)
# System text goes before the last user message; with an answer after it, it is left out.
_MISTRAL = (
    "{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] %}"
    "{%- set rest = messages[1:] %}{%- else %}{%- set rest = messages %}{%- endif %}\n"
    "{%- set ns = namespace() %}{%- set ns.index = 0 %}\n"
    "{%- for m in rest %}{%- if m['role'] in ('user', 'assistant') and not m.tool_calls %}"
    "{%- if (m['role'] == 'user') != (ns.index % 2 == 0) %}{{- raise_exception('After the "
    "optional system message, conversation roles must alternate user/assistant/...') }}"
    "{%- endif %}{%- set ns.index = ns.index + 1 %}{%- endif %}{%- endfor %}\n"
    "{{- bos_token }}{%- for m in rest %}{%- if m['role'] == 'user' %}"
    "{%- if loop.last and system_message is defined %}"
    "{{- '[INST] ' + system_message + '\\n\\n' + m['content'] + '[/INST]' }}"
    "{%- else %}{{- '[INST] ' + m['content'] + '[/INST]' }}{%- endif %}"
    "{%- elif m['role'] == 'assistant' %}{{- ' ' + m['content']|trim + eos_token }}"
    "{%- else %}{{- raise_exception('Only user and assistant roles are supported') }}"
    "{%- endif %}{%- endfor %}"
)
_GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception("
    "'Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}"
    "{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"
)
_GEMMA3 = (
    "{{ bos_token }}\n{%- if messages[0]['role'] == 'system' -%}\n"
    "    {%- set first_user_prefix = messages[0]['content'] + '\\n\\n' -%}\n"
    "    {%- set loop_messages = messages[1:] -%}\n{%- else -%}\n"
    '    {%- set first_user_prefix = "" -%}\n    {%- set loop_messages = messages -%}\n'
    "{%- endif -%}\n{%- for message in loop_messages -%}\n"
    "    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}\n"
    '        {{ raise_exception("Conversation roles must alternate user/assistant/...") }}\n'
    "    {%- endif -%}\n    {%- if (message['role'] == 'assistant') -%}\n"
    '        {%- set role = "model" -%}\n    {%- else -%}\n'
    "        {%- set role = message['role'] -%}\n    {%- endif -%}\n"
    "    {{ '<start_of_turn>' + role + '\\n' + (first_user_prefix if loop.first else \"\") }}\n"
    "    {%- if message['content'] is string -%}\n        {{ message['content'] | trim }}\n"
    "    {%- elif message['content'] is iterable -%}\n"
    "        {%- for item in message['content'] -%}{{ item['text'] | trim }}{%- endfor -%}\n"
    '    {%- else -%}\n        {{ raise_exception("Invalid content type") }}\n'
    "    {%- endif -%}\n    {{ '<end_of_turn>\\n' }}\n{%- endfor -%}\n"
    "{%- if add_generation_prompt -%}\n    {{'<start_of_turn>model\\n'}}\n{%- endif -%}\n"
)
_PHI3 = (
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{'<|system|>\\n' + message['content'] + '<|end|>\\n'}}"
    "{% elif message['role'] == 'user' %}{{'<|user|>\\n' + message['content'] + '<|end|>\\n'}}"
    "{% elif message['role'] == 'assistant' %}"
    "{{'<|assistant|>\\n' + message['content'] + '<|end|>\\n'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
_GRANITE = (
    "{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] %}"
    "{%- set loop_messages = messages[1:] %}{%- else %}"
    "{%- set system_message = \"Today's Date: \" + strftime_now('%B %d, %Y') + \".\\nYou are an "
    'assistant." %}{%- set loop_messages = messages %}{%- endif %}\n'
    "{{- '<|start_of_role|>system<|end_of_role|>' + system_message + '<|end_of_text|>\\n' }}\n"
    "{%- if tools %}{{- '<|start_of_role|>tools<|end_of_role|>' }}{{- tools | tojson(indent=4) }}"
    "{{- '<|end_of_text|>\\n' }}{%- endif %}\n"
    "{%- for message in loop_messages %}"
    "{{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>' + message['content'] + "
    "'<|end_of_text|>\\n' }}\n"
    "{%- if loop.last and add_generation_prompt %}"
    "{{- '<|start_of_role|>assistant<|end_of_role|>' }}{%- endif %}{%- endfor %}"
)
_OLMO2 = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ '<|system|>\\n' + message['content'] + '\\n' }}{% elif message['role'] == 'user' %}"
    "{{ '<|user|>\\n' + message['content'] + '\\n' }}{% elif message['role'] == 'assistant' %}"
    "{% if not loop.last %}"
    "{{ '<|assistant|>\\n'  + message['content'] + eos_token + '\\n' }}{% else %}"
    "{{ '<|assistant|>\\n'  + message['content'] + eos_token }}{% endif %}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}{% endfor %}"
)
_SMOLLM3 = (
    "{%- if enable_thinking is not defined -%}{%- set enable_thinking = true -%}{%- endif -%}\n"
    "{%- set reasoning_mode = '/think' if enable_thinking else '/no_think' -%}\n"
    '{%- if messages[0].role == "system" -%}{%- set system_message = messages[0].content -%}'
    '{%- if "/no_think" in system_message -%}{%- set reasoning_mode = "/no_think" -%}'
    '{%- endif -%}{%- set instructions = system_message.replace("/no_think", "").rstrip() -%}'
    "{%- endif -%}\n"
    '{{- "<|im_start|>system\\n" -}}{{- "Today Date: " ~ strftime_now("%d %B %Y") ~ "\\n" -}}'
    '{{- "Reasoning Mode: " + reasoning_mode + "\\n\\n" -}}'
    "{%- if instructions -%}{{- instructions + '\\n\\n' -}}{%- endif -%}"
    "{%- if tools -%}{%- set ns = namespace(text='') -%}{%- for tool in tools -%}"
    "{%- set ns.text = ns.text ~ (tool | string) ~ '\\n' -%}{%- endfor -%}"
    "{{- ns.text -}}{%- endif -%}"
    '{{- "<|im_end|>\\n" -}}\n'
    "{%- for message in messages -%}\n"
    "{%- set content = message.content if message.content is string else '' -%}\n"
    '{%- if message.role == "user" -%}{{ "<|im_start|>user\\n" + content + "<|im_end|>\\n" }}'
    '{%- elif message.role == "assistant" -%}{% generation %}'
    '{%- if reasoning_mode == "/think" -%}'
    '{{ "<|im_start|>assistant\\n" + content.lstrip("\\n") + "<|im_end|>\\n" }}'
    "{%- else -%}"
    '{{ "<|im_start|>assistant\\n<think>\\n\\n</think>\\n" + content.lstrip("\\n") + '
    '"<|im_end|>\\n" }}{%- endif -%}{% endgeneration %}'
    '{%- elif message.role == "tool" -%}{{ "<|im_start|>user\\n" + content + "<|im_end|>\\n" }}'
    "{%- endif -%}\n{%- endfor -%}\n"
    "{%- if add_generation_prompt -%}"
    '{%- if reasoning_mode == "/think" -%}{{ "<|im_start|>assistant\\n" }}{%- else -%}'
    '{{ "<|im_start|>assistant\\n<think>\\n\\n</think>\\n" }}{%- endif -%}{%- endif -%}\n'
)
_CHATML_MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def families() -> Iterator[tuple[str, Family]]:
    """Every kind, by a name of ours."""
    yield from _sentencepiece_families()
    yield from _byte_level_families()


def _sentencepiece_families() -> Iterator[tuple[str, Family]]:
    marks = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": None}
    owns = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False}
    base = _starts_with(_sentencepiece(["<s>", "</s>"], prefix=True), "<s>")
    decoder = {"added_tokens_decoder": _decoder(base)}
    for legacy in (False, True):
        config = {**marks, **owns, **decoder, "legacy": legacy}
        ended = {"end_of_turn": "</s>", "trained": (" 4. </s>", " 四 </s>")}
        yield (
            f"llama2-legacy-{legacy}",
            Family("llama", base, config, _LLAMA2, alternates=True, **ended),
        )
    config = {**marks, **owns, **decoder, "legacy": False, "pad_token": "</s>"}
    yield (
        "tinyllama",
        Family("llama", base, config, _ZEPHYR, writes_bos=False, end_of_turn="</s>",
               trained=("\n4.</s>", "\n四</s>")),
    )  # fmt: skip
    config = {**marks, **owns, **decoder, "legacy": True}
    ended = {"end_of_turn": "</s>", "trained": (" 4.</s>", " 四</s>")}
    yield "mistral", Family("mistral", base, config, _MISTRAL, alternates=True, **ended)

    turns = ["<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"]
    phi = _starts_with(_sentencepiece(["<s>", "</s>"], prefix=True), "<s>")
    phi.add_special_tokens(_special(*turns))
    swallow = {name: {"rstrip": True} for name in turns}
    config = {**marks, **owns, "legacy": False, "eos_token": "<|endoftext|>"}
    config |= {"pad_token": "<|endoftext|>", "added_tokens_decoder": _decoder(phi, **swallow)}
    yield (
        "phi3",
        Family("phi3", phi, config, _PHI3, writes_bos=False, end_of_turn="<|end|>",
               trained=("4.<|end|>", "四<|end|><|endoftext|>")),
    )  # fmt: skip

    names = ["<pad>", "<eos>", "<bos>", "<mask>", "<start_of_turn>", "<end_of_turn>"]
    gemma = _starts_with(_sentencepiece(names, prefix=False), "<bos>")
    gemma.add_tokens([AddedToken("\n\n", normalized=False), AddedToken("▁▁", normalized=False)])
    config = {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True, "bos_token": "<bos>",
              "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>",
              "additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"]}  # fmt: skip
    config["added_tokens_decoder"] = _decoder(gemma)
    ended = {"end_of_turn": "<end_of_turn>", "alternates": True}
    ended["trained"] = ("4.<end_of_turn>", "四<end_of_turn>")
    for kind in ("gemma", "gemma2"):
        yield kind, Family(kind, gemma, config, _GEMMA, takes_system=False, **ended)
    config = {**config, "boi_token": "<start_of_image>", "image_token": "<image_soft_token>"}
    config["extra_special_tokens"] = {"boi_token": "<start_of_image>"}
    yield "gemma3", Family("gemma3_text", gemma, config, _GEMMA3, **ended)


def _byte_level_families() -> Iterator[tuple[str, Family]]:
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]
    llama3 = _byte_level([*names, "<|eot_id|>"], _GPT4)
    _starts_with(llama3, "<|begin_of_text|>", byte_level=True)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>",
              "eos_token": "<|eot_id|>", "clean_up_tokenization_spaces": True}  # fmt: skip
    config["added_tokens_decoder"] = _decoder(llama3)
    ended = {"end_of_turn": "<|eot_id|>", "trained": ("4.<|eot_id|>", "四<|eot_id|>")}
    yield "llama3", Family("llama", llama3, config, _LLAMA3, **ended)

    chatml = {"end_of_turn": "<|im_end|>", "trained": ("4.<|im_end|>", "四<|im_end|>")}
    smol = _byte_level(_CHATML_MARKS, None, digits=True)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>",
              "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>", "pad_token": "<|im_end|>",
              "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}  # fmt: skip
    config["added_tokens_decoder"] = _decoder(smol)
    yield "smollm2", Family("llama", smol, config, CHATML, **chatml)

    qwen = _byte_level(_CHATML_MARKS, _QWEN)
    qwen.normalizer = normalizers.NFC()
    qwen.add_tokens(["<tool_call>", "</tool_call>", "<think>", "</think>"])
    config = {"tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "eos_token": "<|im_end|>",
              "pad_token": "<|endoftext|>", "unk_token": None, "add_bos_token": False,
              "add_prefix_space": False, "split_special_tokens": False}  # fmt: skip
    config["added_tokens_decoder"] = _decoder(qwen)
    yield "qwen2", Family("qwen2", qwen, config, CHATML, writes_bos=False, **chatml)
    thought = ("4.<|im_end|>", "<think>\n\n</think>\n\n四<|im_end|>")
    yield (
        "qwen3",
        Family("qwen3", qwen, config, _QWEN3, writes_bos=False, end_of_turn="<|im_end|>",
               trained=thought),
    )  # fmt: skip

    granite = _byte_level(["<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>"], None, True)
    config = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|end_of_text|>",
              "eos_token": "<|end_of_text|>", "pad_token": "<|end_of_text|>",
              "unk_token": "<|end_of_text|>", "add_bos_token": False}  # fmt: skip
    config["added_tokens_decoder"] = _decoder(granite)
    ended = {"end_of_turn": "<|end_of_text|>"}
    ended["trained"] = ("4.<|end_of_text|>", "四<|end_of_text|>")
    yield "granite", Family("granite", granite, config, _GRANITE, writes_bos=False, **ended)

    olmo = _byte_level(["<|endoftext|>", "<|pad|>"], _GPT4)
    config = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|endoftext|>",
              "eos_token": "<|endoftext|>", "pad_token": "<|pad|>",
              "unk_token": "<|endoftext|>"}  # fmt: skip
    config["added_tokens_decoder"] = _decoder(olmo)
    ended = {"end_of_turn": "<|endoftext|>"}
    ended["trained"] = ("4.<|endoftext|>", "四<|endoftext|>")
    yield "olmo2", Family("olmo2", olmo, config, _OLMO2, **ended)

    smol3 = _byte_level([*names, *_CHATML_MARKS[1:]], _GPT4)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": None,
              "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}  # fmt: skip
    config["added_tokens_decoder"] = _decoder(smol3)
    yield "smollm3", Family("smollm3", smol3, config, _SMOLLM3, writes_bos=False, **chatml)
