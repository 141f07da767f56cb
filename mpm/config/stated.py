"""What a configuration file and the `key=value` words after it state, and where."""

from typing import Any, get_args

import yaml

from mpm.config.schema import Sections, at, field_sections, sections_at
from mpm.config.section import Section
from mpm.config.yaml import Document, parse

__all__ = ["Stated", "one_line"]


class Stated:
    """Keys and values as written, not yet checked.

    Args:
        document: the file; its value is changed by overrides.
        name: of the file, for messages.
        model: of the configuration.

    Attributes:
        raw: the values.
    """

    def __init__(self, document: Document, *, name: str, model: type[Section]):
        self.raw: dict[str, Any] = document.value
        self._name = name
        self._model = model
        self._lines = dict(document.lines)
        self._words: dict[str, str] = {}

    def override(self, word: str) -> None:
        """Apply one `key=value`; a later word wins.

        A key replaces its alternative (steps, epochs); another `kind` drops keys that only the former has.

        Raises:
            ValueError: if it is no `key=value`, is not UTF-8, or goes below a plain value.
        """
        key, equals, text = word.partition("=")
        key = key.strip()
        if not equals or not all(key.split(".")):
            raise ValueError(f'"{word}" is no key=value; write for example optim.lr=3e-4')
        try:
            text.encode()
        except UnicodeEncodeError:  # the name of a file; YAML holds no such text
            raise ValueError(
                f"the value of override {word} is not UTF-8; use another name, or a link"
            ) from None
        try:
            value = parse(text).value
        except (yaml.YAMLError, ValueError) as error:
            raise ValueError(f"the value of override {word} cannot be read: {one_line(error)}") from None
        *above, last = key.split(".")
        node = self.raw
        sections: Sections = [self._model]
        parent, optional = self.raw, False
        for depth, part in enumerate(above, start=1):
            optional = _takes_null(sections, part)
            parent, sections = node, field_sections(sections, part)
            if node.get(part) is None:
                self._words[".".join(above[:depth])] = word
                node[part] = {}
            node = node[part]
            if not isinstance(node, dict):
                raise ValueError(f"override {word}: {'.'.join(above[:depth])} is {node!r} and holds no keys")
            sections = at(sections, node)
        if value is None and optional and not _takes_null(sections, last):
            parent[above[-1]] = None  # init.checkpoint=null: there is no init then
            key = ".".join(above)
        else:
            self._make_room(node, sections, key, value)
            node[last] = value
        self._forget(key)
        self._record(key, value, word)

    def _make_room(self, node: dict[str, Any], sections: Sections, key: str, value: Any) -> None:
        """Drop what a value replaces besides its own key."""
        prefix, _, last = key.rpartition(".")
        dropped: set[str] = set()
        if value is not None:
            dropped = {section.alternatives[last] for section in sections if last in section.alternatives}
        if last == "kind":
            members = sections_at(self._model, prefix)
            former = {name for section in at(members, node) for name in section.model_fields}
            dropped = former - {
                name for section in at(members, {"kind": value}) for name in section.model_fields
            }
        for name in dropped & node.keys():
            del node[name]
            self._forget(f"{prefix}.{name}" if prefix else name)

    def _forget(self, key: str) -> None:
        for places in (self._lines, self._words):
            for name in [name for name in places if name == key or name.startswith(f"{key}.")]:
                del places[name]

    def _record(self, key: str, value: Any, word: str) -> None:
        self._words[key] = word
        if isinstance(value, dict):
            for name, below in value.items():
                self._record(f"{key}.{name}", below, word)

    def place(self, key: str) -> str:
        """Where a key, or else the section around it, is stated: for messages."""
        while key:
            if key in self._words:
                return f"override {self._words[key]}"
            if key in self._lines:
                return f"{self._name}:{self._lines[key]}"
            key = key.rpartition(".")[0]
        return self._name

    def origin(self, key: str) -> str | None:
        """Where exactly this key is stated: "override", "file:LINE", or None."""
        if key in self._words:
            return "override"
        return f"{self._name}:{self._lines[key]}" if key in self._lines else None


def _takes_null(sections: Sections, key: str) -> bool:
    annotations = [s.model_fields[key].annotation for s in sections if key in s.model_fields]
    return not annotations or any(type(None) in get_args(annotation) for annotation in annotations)


def one_line(error: Exception) -> str:
    """An error's text without line breaks."""
    return " ".join(str(error).split())
