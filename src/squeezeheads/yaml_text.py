"""YAML as plain data, where every key counts."""

from __future__ import annotations

from typing import Any

import yaml


def read_yaml(text: str) -> Any:
    """What a safe loader makes of the text: no object but mappings, lists, texts and numbers.

    Raises:
        ValueError: a mapping that holds a key twice, of which YAML readers keep the last without a word; names the key
            and its lines.
        yaml.YAMLError: no YAML.
    """
    return yaml.load(text, _OnceLoader)


class _OnceLoader(yaml.SafeLoader):
    # Here rather than when mappings are made: by then keys of merged mappings (<<) stand beside the mapping's own.
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # a SafeLoader refuses it
            name, line = (key.tag, key.value), key.start_mark.line + 1
            if name in lines:
                raise ValueError(
                    f"the key {key.value!r} is written twice, on lines {lines[name]} and {line}: the first would be "
                    "dropped. Put what belongs to it under one, or leave one out."
                )
            lines[name] = line
        return node
