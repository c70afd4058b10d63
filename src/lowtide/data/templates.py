"""Chat templates, rendered as Hugging Face's `apply_chat_template` renders them.

jinja2, and the sandbox that templates run in, are imported when the first one is rendered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lowtide.errors import DataError

if TYPE_CHECKING:
    from lowtide.data.sandbox import Compiled

Message = Mapping[str, Any]
_MOST_SAID = 1000
_REASONING = ("reasoning_content", "thinking", "reasoning")


class TemplateRefusal(DataError):
    """A template raised, in its own words, on messages that another one might take.

    Args:
        origin: Which template.
        said: Its own words.
    """

    def __init__(self, origin: str, said: str) -> None:
        super().__init__(f"{origin} refuses these messages: {said}")
        self.said = said

    @property
    def kind(self) -> str:
        """To a parent process it is a DataError like any other."""
        return DataError.__name__


class ChatTemplate:
    """One Jinja template and the names of the special tokens that it may use.

    Args:
        source: The template's text.
        special_tokens: `bos_token`, `eos_token` and so on, as the template sees them.
        origin: Where the template came from, for error messages.
        tools_source: Another text to use where tools are given; None where one serves both.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str] | None = None,
        origin: str = "the chat template",
        tools_source: str | None = None,
    ) -> None:
        self.source = source
        self.origin = origin
        self.tools_source = tools_source
        self.special_tokens = dict(special_tokens or {})
        self._compiled: dict[str, Compiled] = {}

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as the text that the model was trained to read.

        Args:
            messages: The turns; keys whose value is None are left out, as Hugging Face does.
            add_generation_prompt: End with the header that opens an assistant turn.
            tools: Tool descriptions, for templates that list them.
            variables: Whatever else this template reads, such as `enable_thinking`.

        Returns:
            The rendered text, with the special tokens written out.

        Raises:
            DataError: The template is broken, or (as `TemplateRefusal`) it refuses these messages
                in its own words.
        """
        source = self.source
        if tools is not None and self.tools_source is not None:
            source = self.tools_source
        compiled = self._compile(source)
        given: dict[str, Any] = {
            "documents": None,
            **self.special_tokens,
            **(variables or {}),
            "messages": [_plain(turn) for turn in messages],
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return compiled.render(**given)
        except Exception as error:  # the template is foreign code: whatever it raises is its own
            said = str(error) or type(error).__name__
            said = said if len(said) <= _MOST_SAID else f"{said[:_MOST_SAID]} ..."
            raise TemplateRefusal(self.origin, said) from None

    def _compile(self, source: str) -> Compiled:
        import jinja2

        from lowtide.data.sandbox import Compiled

        if source not in self._compiled:
            try:
                self._compiled[source] = Compiled(source)
            except jinja2.TemplateSyntaxError as error:
                raise DataError(
                    f"{self.origin} is not a valid Jinja template: line {error.lineno}: "
                    f"{error.message}. Mend it, or pass another with --chat-template FILE."
                ) from None
            except RecursionError:
                raise DataError(
                    f"{self.origin} is nested too deeply to be read. Pass another with "
                    "--chat-template FILE."
                ) from None
        return self._compiled[source]


def _plain(message: Message) -> dict[str, Any]:
    """A message as templates expect it: nothing that is None, reasoning under all its names."""
    turn = {key: value for key, value in message.items() if value is not None}
    reasoning = next((turn[key] for key in _REASONING if key in turn), None)
    if reasoning is None:
        return turn
    return {"thinking": reasoning, **turn, "reasoning_content": reasoning}
