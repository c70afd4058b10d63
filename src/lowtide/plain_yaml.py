"""YAML as settings need it: no aliases, no key twice, and errors of one kind.

Aliases let ten lines stand for a billion values, and a key that is there twice would say two
things; a file of settings needs neither.
"""

from __future__ import annotations

from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """The safe loader without what a flat file of settings has no use for."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.events.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(
                None, None, "aliases (*name) are not read here; write the value", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        found = super().construct_mapping(node, deep)
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(
                None, None, f"{twice!r} is there twice", node.start_mark
            )
        return found


class _Dumper(yaml.SafeDumper):
    """The safe dumper; a value that is there twice is written twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def dump_plain_yaml(document: Any) -> str:
    """A document as YAML that `load_plain_yaml` reads back.

    Args:
        document: of plain values.

    Returns:
        The text.
    """
    return str(yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=True))


def load_plain_yaml(text: str) -> Any:
    """The one document in a text.

    Args:
        text: YAML.

    Returns:
        Its value; None where there is nothing.

    Raises:
        ValueError: it is not YAML, is nested too deeply, or uses what is not read here.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
