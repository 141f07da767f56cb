"""Pydantic's errors in our words: which key, what is wrong, what would be right."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from mpm.config.schema import Sections, field_sections, kind_of, sections_at
from mpm.config.section import Section

__all__ = ["Complaint", "complaints"]

_EXPECTED = {
    "float_type": "a number",
    "finite_number": "a finite number",
    "int_type": "a whole number",
    "bool_type": "true or false",
    "string_type": "text",
    "path_type": "a path",
    "tuple_type": "a list",
    "frozen_set_type": "a list",
    "model_type": "a mapping of keys",
    "model_attributes_type": "a mapping of keys",
}


class Complaint(NamedTuple):
    """One thing that is wrong.

    Attributes:
        key: dotted, "" for a rule between sections.
        text: one line that names the key, the value, and what would be right.
    """

    key: str
    text: str


def complaints(error: ValidationError, model: type[Section]) -> list[Complaint]:
    """Everything that a failed validation found, one complaint a key."""
    found: dict[str, list[ErrorDetails]] = {}
    for detail in error.errors():
        found.setdefault(_key(detail, model), []).append(detail)
    # of a union, what got furthest: a wrong number in a list, not that a list is no name
    shown = {
        key: details for key, details in found.items() if not any(k.startswith(f"{key}[") for k in found)
    }
    return [Complaint(key.partition("[")[0], _text(key, details, model)) for key, details in shown.items()]


def _key(detail: ErrorDetails, model: type[Section]) -> str:
    """The dotted key of an error, whose location also names the kinds and types that were tried."""
    key = ""
    sections: Sections = [model]
    for part in detail["loc"]:
        kinds = {kind_of(section): section for section in sections}
        if isinstance(part, int):
            key += f"[{part}]"
        elif len(sections) > 1 and part in kinds:
            sections = [kinds[part]]
        elif any(part in section.model_fields for section in sections):
            key += f".{part}" if key else part
            sections = field_sections(sections, part)
    return f"{key}.kind" if detail["type"].startswith("union_tag") else key


def _text(key: str, details: Sequence[ErrorDetails], model: type[Section]) -> str:
    detail = details[0]
    value, context = _show(detail["input"]), detail.get("ctx", {})
    match detail["type"]:
        case "missing" if key.endswith("]"):
            return f"{key} is missing; give one more value"
        case "missing":
            return f"{key} is required; give it"
        case "too_long":
            return f"{key} has {context['actual_length']} values; give {context['max_length']}"
        case "value_error":
            message = str(context["error"])
            return f"{key}: {message}" if key else message
        case "union_tag_not_found":
            return f"{key} is required; use one of {_kinds(key, model)}"
        case "union_tag_invalid":
            return f'{key} is "{context["tag"]}", expected one of {_kinds(key, model)}'
        case kind if kind in _EXPECTED or kind == "literal_error":
            expected = dict.fromkeys(_expected(detail) for detail in details)
            return f"{key} is {value}, expected {' or '.join(expected)}"
    return f"{key} is {value}, {detail['msg'].replace('Input should', 'must')}"


def _expected(detail: ErrorDetails) -> str:
    if detail["type"] == "literal_error":
        return str(detail["ctx"]["expected"]).replace("'", "").replace(" or ", ", ").replace(", ", " or ")
    return _EXPECTED.get(detail["type"], detail["msg"])


def _kinds(key: str, model: type[Section]) -> str:
    """What may stand at a key named `kind`."""
    return ", ".join(str(kind_of(section)) for section in sections_at(model, key.removesuffix(".kind")))


def _show(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
