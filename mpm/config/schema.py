"""What the models of a configuration look like from outside: its keys, and the nearest to a misspelt one."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, get_args

from mpm.config.section import Section

__all__ = [
    "Sections",
    "UnknownKey",
    "at",
    "field_sections",
    "kind_of",
    "names",
    "sections_at",
    "suggestion",
    "unknown_keys",
]

Sections = Sequence[type[Section]]


def field_sections(sections: Sections, key: str) -> Sections:
    """The sections that may stand under a key; empty where it holds a plain value or does not exist."""
    found = [section.model_fields[key].annotation for section in sections if key in section.model_fields]
    return list(dict.fromkeys(member for annotation in found for member in _members(annotation)))


def sections_at(model: type[Section], key: str) -> Sections:
    """All sections that may stand at a dotted key, whatever the kinds above it."""
    sections: Sections = [model]
    for part in filter(None, key.split(".")):
        sections = field_sections(sections, part)
    return sections


def _members(annotation: Any) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for argument in get_args(annotation):
        yield from _members(argument)


def kind_of(section: type[Section]) -> str | None:
    """What `kind:` says where this section is meant."""
    field = section.model_fields.get("kind")
    return None if field is None else str(get_args(field.annotation)[0])


def at(sections: Sections, raw: Any) -> Sections:
    """Of the sections that may stand at a place, those that a value's `kind` leaves."""
    kind = raw.get("kind") if isinstance(raw, Mapping) else None
    # a misspelt `kind` is told as such, not as the default's not having the keys beside it
    has_none = isinstance(raw, Mapping) and kind is None and raw.keys() <= set(_keys(sections))
    default = [section for section in sections if section.is_default_kind and has_none]
    return [section for section in sections if kind_of(section) == kind] or default or sections


def names(sections: Sections, prefix: str = "") -> Iterator[str]:
    """All dotted names below some sections."""
    for key in _keys(sections):
        yield f"{prefix}{key}"
        yield from names(field_sections(sections, key), f"{prefix}{key}.")


class UnknownKey(NamedTuple):
    """A key that no section has.

    Attributes:
        name: dotted.
        sections: that may stand at its place, of any kind.
        raw: the mapping it was found in.
    """

    name: str
    sections: Sections
    raw: Mapping[str, Any]


def unknown_keys(sections: Sections, raw: Mapping[str, Any], prefix: str = "") -> Iterator[UnknownKey]:
    """Keys of a mapping that no section at its place has."""
    chosen = at(sections, raw)
    for key, value in raw.items():
        if key not in _keys(chosen):
            yield UnknownKey(f"{prefix}{key}", sections, raw)
        elif isinstance(value, Mapping) and (below := field_sections(chosen, key)):
            yield from unknown_keys(below, value, f"{prefix}{key}.")


def suggestion(unknown: UnknownKey, everywhere: Sequence[str], *, elsewhere: str | None = None) -> str:
    """What the writer of an unknown key may have meant.

    Args:
        unknown: the key.
        everywhere: all dotted names of its configuration.
        elsewhere: says which other configuration has a key of this name; None: there is none.
    """
    prefix, dot, key = unknown.name.rpartition(".")
    chosen = at(unknown.sections, unknown.raw)
    here = _keys(chosen)
    if kinds := [str(kind_of(section)) for section in unknown.sections if key in section.model_fields]:
        return f"kind {kind_of(chosen[0])} does not have it, only {' and '.join(kinds)}"
    last = {name.rpartition(".")[2]: name for name in reversed(everywhere)}
    if elsewhere is not None:
        return f"{elsewhere}; " + (f"did you mean {last[key]}?" if key in last else "remove it")
    if near := _nearest(key, here):
        return f"did you mean {prefix}{dot}{near}?"
    if near := _nearest(key, list(last)):
        return f"did you mean {last[near]}?"
    return f"the keys there are {', '.join(here)}"


def _keys(sections: Sections) -> list[str]:
    return list(dict.fromkeys(key for section in sections for key in section.model_fields))


def _nearest(key: str, candidates: Sequence[str]) -> str | None:
    """The most similar name, or one that is the initials of the key (larning_rate: lr) or has them (wd)."""
    for letters in (0, 1):
        for name in candidates:
            if len(name) == len(key) and sum(a != b for a, b in zip(name, key, strict=True)) == letters:
                return name
    if close := difflib.get_close_matches(key, candidates, n=1, cutoff=0.5):
        return close[0]
    related = (name for name in candidates if len(name) > 1 and len(key) > 1 and _related(name, key))
    return next(related, None)


def _related(name: str, key: str) -> bool:
    return name == _initials(key) or key == _initials(name)


def _initials(name: str) -> str:
    return "".join(word[:1] for word in name.split("_"))
