"""data.yaml, as YOLO's tools write it, read by PyYAML with every scalar as text."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from rtmdet_fast.data.formats.files import read_text
from rtmdet_fast.errors import UserError, shown

Value = str | None | list[str] | dict[str, str]


def read_yaml(path: Path, keys: Collection[str]) -> dict[str, Value]:
    """Those of the top-level keys that the file has; what else it holds may be anything.

    Raises UserError, naming the line, for what is no YAML, and where a value of theirs is neither text nor a list or
    map of texts.
    """
    import yaml

    def refuse(what: str, line: int) -> UserError:
        return UserError(
            f"{shown(str(path))}, line {line + 1}: {what}; write names as `names: [cat, dog]` or a line each, and "
            "folders as text"
        )

    def text(node: yaml.Node) -> str:
        if not isinstance(node, yaml.ScalarNode) or (node.value == "" and not node.style):
            raise refuse("a list or map of more than plain values, or an empty one", node.start_mark.line)
        return str(node.value)

    def pairs(node: yaml.MappingNode) -> dict[str, yaml.Node]:
        found: dict[str, yaml.Node] = {}
        for key, value in node.value:
            name = text(key)
            if name in found:
                raise refuse(f"{shown(name)} occurs twice", key.start_mark.line)
            found[name] = value
        return found

    def value_of(node: yaml.Node) -> Value:
        if isinstance(node, yaml.SequenceNode):
            return [text(item) for item in node.value]
        if isinstance(node, yaml.MappingNode):
            return {key: text(value) for key, value in pairs(node).items()}
        return str(node.value) or None

    try:
        root = yaml.compose(read_text(path), yaml.BaseLoader)  # nodes alone: nothing of it is run or built
    except RecursionError:
        raise refuse("lists or maps in one another without end", 0) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise refuse(f"is no YAML ({error.problem})", mark.line if mark else 0) from None
    except yaml.YAMLError:
        raise UserError(f"{shown(str(path))}: is no YAML: holds characters that no text has") from None
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise refuse("no `key: value`", root.start_mark.line)
    return {key: value_of(node) for key, node in pairs(root).items() if key in keys}
