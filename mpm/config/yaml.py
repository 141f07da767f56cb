"""YAML as configurations need it: the line of every key, no key twice, and 1e-4 as a number."""

import re
from typing import Any, NamedTuple

import yaml

__all__ = ["Document", "parse"]


class Document(NamedTuple):
    """What a YAML text says.

    Attributes:
        value: dicts, lists and scalars.
        lines: line of each key by its dotted name, from 1.
    """

    value: Any
    lines: dict[str, int]


class _Loader(yaml.SafeLoader):
    pass


# YAML 1.2's floats; PyYAML follows 1.1 and reads 1e-4, which has no point, as text
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def parse(text: str) -> Document:
    """Read one YAML document.

    Raises:
        yaml.YAMLError: if it is not well formed.
        ValueError: if a key comes twice, or is no name, or an anchor contains itself.
    """
    loader = _Loader(text)
    lines: dict[str, int] = {}
    node = loader.get_single_node()
    return Document(None if node is None else _build(loader, node, "", lines, frozenset()), lines)


def _build(
    loader: _Loader, node: yaml.Node, prefix: str, lines: dict[str, int], inside: frozenset[int]
) -> Any:
    if id(node) in inside:
        raise ValueError(f"line {_line(node)}: an anchor contains itself")
    inside |= {id(node)}
    match node:
        case yaml.SequenceNode():
            return [_build(loader, item, prefix, {}, inside) for item in node.value]
        case yaml.MappingNode():
            return _build_mapping(loader, node, prefix, lines, inside)
    return loader.construct_object(node)


def _build_mapping(
    loader: _Loader, node: yaml.MappingNode, prefix: str, lines: dict[str, int], inside: frozenset[int]
) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    own: dict[str, Any] = {}
    for key_node, value_node in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            sources = value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
            for source in reversed(sources):  # the first of a list wins
                merged |= _build(loader, source, prefix, lines, inside)
            continue
        key = key_node.value
        if not isinstance(key, str) or key_node.tag != "tag:yaml.org,2002:str":
            raise ValueError(f"line {_line(key_node)}: the key {key} is no name; quote it, or correct it")
        name = f"{prefix}{key}"
        if key in own:
            raise ValueError(f"line {_line(key_node)}: {name} is given twice; keep one")
        lines[name] = _line(key_node)
        own[key] = _build(loader, value_node, f"{name}.", lines, inside)
    return merged | own


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1
