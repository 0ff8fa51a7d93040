"""Reading YAML that nobody vouches for: plain scalars, lists and mappings, in bounded time and memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import yaml

from trainer.data.shards import read_regular
from trainer.errors import one_line

SIZE_LIMIT = 1 << 18  # bytes; a hundred times what a configuration has
DEPTH_LIMIT = 20


class Unreadable(Exception):
    """Text that is not such YAML; the message is one line that says why."""


class _Loader(yaml.SafeLoader):
    """Without aliases (a few lines of them expand to terabytes), tags, dates and repeated keys."""

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise yaml.MarkedYAMLError(None, None, f"alias *{event.anchor}: write the value out", event.start_mark)
        if event.tag is not None:
            raise yaml.MarkedYAMLError(None, None, f"tag {event.tag}: tags are not read", event.start_mark)
        if self.depth >= DEPTH_LIMIT:
            raise yaml.MarkedYAMLError(None, None, "nested too deeply", event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        value = super().construct_yaml_int(node)
        if not -(2**63) <= value < 2**63:
            raise yaml.MarkedYAMLError(None, None, "not a 64-bit number", node.start_mark)
        return value

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            name = (key.tag, str(key.value))
            if name in seen:
                raise yaml.MarkedYAMLError(None, None, f"{key.value!r} occurs twice", key.start_mark)
            seen.add(name)
        return node


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def parse_yaml(text: str) -> Any:
    """Nested dicts and lists of strings, numbers, truth values and None. Raises Unreadable."""
    if len(text) > SIZE_LIMIT:
        raise Unreadable(f"{len(text)} characters, more than {SIZE_LIMIT}")
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # PyYAML leaks those of int() and float()
        raise Unreadable(one_line(error)) from None


def read_yaml(path: Path) -> Any:
    """What a file holds, as `parse_yaml`. Raises Unreadable."""
    try:
        return parse_yaml(read_regular(path, SIZE_LIMIT).decode())
    except (OSError, UnicodeDecodeError) as error:
        raise Unreadable(one_line(error)) from None
