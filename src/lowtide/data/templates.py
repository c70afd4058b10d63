"""Chat templates, rendered as Hugging Face's `apply_chat_template` renders them.

A template is somebody else's program that came with a model, so it runs in jinja2's immutable
sandbox: it can read the messages and build a string, and nothing else. jinja2 is imported when
the first template is rendered.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from lowtide.errors import DataError

if TYPE_CHECKING:
    from jinja2 import Template
    from jinja2.sandbox import ImmutableSandboxedEnvironment

Message = Mapping[str, Any]


class ChatTemplate:
    """One Jinja template and the names of the special tokens that it may use.

    Args:
        source: The template's text.
        special_tokens: `bos_token`, `eos_token` and so on, as the template sees them.
        origin: Where the template came from, for error messages.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str] | None = None,
        origin: str = "the chat template",
    ) -> None:
        self.source = source
        self.origin = origin
        self._special_tokens = dict(special_tokens or {})
        self._compiled: Template | None = None

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The conversation as the text that the model was trained to read.

        Args:
            messages: The turns; keys whose value is None are left out, as Hugging Face does.
            add_generation_prompt: End with the header that opens an assistant turn.
            tools: Tool descriptions, for templates that list them.

        Returns:
            The rendered text, with the special tokens written out.

        Raises:
            DataError: The template is broken, or it refuses these messages; in its own words.
        """
        import jinja2

        turns = [{k: v for k, v in turn.items() if v is not None} for turn in messages]
        try:
            if self._compiled is None:
                self._compiled = _environment().from_string(self.source)
            return self._compiled.render(
                messages=turns,
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except jinja2.TemplateSyntaxError as error:
            raise DataError(
                f"{self.origin} is not a valid Jinja template: line {error.lineno}: "
                f"{error.message}. Mend it, or pass another with --chat-template FILE."
            ) from None
        except Exception as error:  # the template is foreign code: whatever it raises is its own
            raise DataError(
                f"{self.origin} refuses these messages: {error or type(error).__name__}"
            ) from None


@lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    """The sandbox with the settings, filters and globals that published templates rely on."""
    import jinja2
    import jinja2.ext
    from jinja2 import nodes
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationBlock(jinja2.ext.Extension):
        """`{% generation %}` marks an assistant's text for other trainers; here it renders it."""

        tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # jinja2's own filter escapes <, >, & and ', which no model was trained on.
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    def strftime_now(pattern: str) -> str:
        return datetime.now().strftime(pattern)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[jinja2.ext.loopcontrols, GenerationBlock],
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment
