"""Configuration files: YAML and `key=value` words to a checked configuration, and back to text."""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import yaml
from pydantic import ValidationError

from mpm.config import (
    TOKENIZER_KINDS,
    FinetuneConfig,
    ImportedConfig,
    PretrainConfig,
    TokenizerConfig,
)
from mpm.config.complaints import complaints
from mpm.config.schema import names, suggestion, unknown_keys
from mpm.config.section import Section
from mpm.config.stated import Stated, one_line
from mpm.config.yaml import Document, parse

__all__ = [
    "AnyConfig",
    "ConfigError",
    "Loaded",
    "dump",
    "explain",
    "from_words",
    "load",
    "model_of",
    "same_run",
    "validate",
]

AnyConfig = PretrainConfig | TokenizerConfig | FinetuneConfig | ImportedConfig
Config = TypeVar("Config", bound=AnyConfig)
AnySection = TypeVar("AnySection", bound=Section)

MOST_LINES = 5
_WHAT: dict[type[Section], str] = {
    PretrainConfig: "pretraining",
    TokenizerConfig: "a tokenizer",
    FinetuneConfig: "fine-tuning",
}


class ConfigError(ValueError):
    """A configuration that cannot be used: one line for each thing that is wrong, five at most."""


class Loaded(NamedTuple, Generic[Config]):
    """A configuration, and where each of its values came from.

    Attributes:
        config: the checked configuration.
        origins: by dotted key: "file:LINE", "override", "variant", "checkpoint" or "default".
    """

    config: Config
    origins: dict[str, str]


def load(path: str | Path, overrides: Sequence[str], model: type[Config]) -> Loaded[Config]:
    """Read a configuration file.

    Args:
        path: of the YAML file.
        overrides: `key=value` words that replace what it states; values are YAML.
        model: of the configuration.

    Raises:
        ConfigError: if the file cannot be read, or what it states is wrong.
    """
    stated = Stated(_read(path), name=str(path), model=model)
    config = _overridden(stated, overrides, model)
    return Loaded(config, {key: _origin(key, config, stated) for key in _values(config)})


def from_words(
    base: Mapping[str, Any], overrides: Sequence[str], model: type[AnySection], *, name: str
) -> AnySection:
    """A section out of plain data and `key=value` words.

    Args:
        base: nested dicts.
        overrides: `key=value` words that replace what it states; values are YAML.
        model: of the section.
        name: of its source, for messages.

    Raises:
        ConfigError: if something in it is wrong.
    """
    return _overridden(Stated(Document(dict(base), {}), name=name, model=model), overrides, model)


def _overridden(stated: Stated, overrides: Sequence[str], model: type[AnySection]) -> AnySection:
    for word in overrides:
        try:
            stated.override(word)
        except ValueError as error:
            raise ConfigError(str(error)) from None
    return _validate(stated, model)


def model_of(path: str | Path) -> type[AnyConfig]:
    """Which of the configurations a file is, by what only that one has.

    Raises:
        ConfigError: if the file cannot be read, or is none.
    """
    stated = _read(path).value
    if stated.get("kind") == "imported":
        return ImportedConfig
    if "objective" in stated:
        return _pretraining_model(stated["objective"])
    if "readout" in stated:
        return FinetuneConfig
    raise ConfigError(
        f"{path} configures nothing; give it an objective (to pretrain) or a readout (to fine-tune)"
    )


def pretraining_model_of(
    path: str | Path, overrides: Sequence[str] = ()
) -> type[PretrainConfig] | type[TokenizerConfig]:
    """Which of the two that pretrain.py takes, by `objective.kind` in the file or the words.

    Raises:
        ConfigError: if the file cannot be read.
    """
    objective = _read(path).value.get("objective")
    for word in overrides:
        key, _, text = word.partition("=")
        with contextlib.suppress(yaml.YAMLError, ValueError):  # told where it is applied
            if key.strip() == "objective":
                objective = parse(text).value
            elif key.strip() == "objective.kind":
                objective = {"kind": parse(text).value}
    return _pretraining_model(objective)


def _pretraining_model(objective: Any) -> type[PretrainConfig] | type[TokenizerConfig]:
    kind = objective.get("kind") if isinstance(objective, dict) else None
    return TokenizerConfig if kind in TOKENIZER_KINDS else PretrainConfig


def _read(path: str | Path) -> Document:
    try:
        document = parse(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}:{line} is not UTF-8; save the file as UTF-8") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path} is no readable YAML: {one_line(error)}") from None
    if not isinstance(document.value, dict):
        raise ConfigError(f"{path} holds no keys; begin with run: {{output_dir: ...}}")
    return document


def validate(raw: Mapping[str, Any], model: type[Config], *, name: str) -> Config:
    """Check a configuration given as plain data, such as a checkpoint's.

    Args:
        raw: nested dicts.
        model: of the configuration.
        name: of its source, for messages.

    Raises:
        ConfigError: if something in it is wrong.
    """
    return _validate(Stated(Document(dict(raw), {}), name=name, model=model), model)


def _validate(stated: Stated, model: type[AnySection]) -> AnySection:
    if unknown := list(unknown_keys([model], stated.raw)):
        everywhere = list(names([model]))
        raise _error(
            f"unknown key {key.name} in {stated.place(key.name)}; "
            + suggestion(key, everywhere, elsewhere=_elsewhere(key.name, model))
            for key in unknown
        )
    try:
        return model.model_validate(stated.raw)
    except ValidationError as error:
        raise _error(f"{stated.place(key)}: {text}" for key, text in complaints(error, model)) from None


def _elsewhere(key: str, model: type[Section]) -> str | None:
    """That another configuration has a key, where it does."""
    others = [what for other, what in _WHAT.items() if other is not model and key in names([other])]
    if model not in _WHAT or not others:
        return None
    return f"{_WHAT[model]} has no {key}, {' and '.join(others)} {'have' if others[1:] else 'has'}"


def _error(lines: Iterator[str]) -> ConfigError:
    listed = list(lines)
    more = [f"and {len(listed) - MOST_LINES} more"] if len(listed) > MOST_LINES else []
    return ConfigError("\n".join(listed[:MOST_LINES] + more))


def dump(config: AnyConfig) -> str:
    """YAML that loads again to an equal configuration; what is the checkpoint's is left to it."""
    raw = config.model_dump(mode="json")
    for key in _inherited(config):
        section, _, name = key.partition(".")
        if name:
            del raw[section][name]
    return yaml.safe_dump(raw, sort_keys=False, default_flow_style=None, width=110)


def explain(config: AnyConfig, origins: Mapping[str, str]) -> str:
    """Every value and where it came from, one a line, aligned."""
    rows = [(key, json.dumps(value), origins.get(key, "default")) for key, value in _values(config).items()]
    rows = [(key, "-" if origin == "checkpoint" else value, origin) for key, value, origin in rows]
    width = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(f"{key:{width[0]}}  {value:{width[1]}}  {origin}" for key, value, origin in rows)


def same_run(a: AnyConfig, b: AnyConfig) -> list[str]:
    """Dotted keys outside `run` in which two configurations differ; empty where they are the same run."""
    left, right = (json.loads(json.dumps(_values(config))) for config in (a, b))  # tuples are lists
    differing = (
        key for key in left | right if left.get(key) != right.get(key) or (key in left) != (key in right)
    )
    # codes in a cache are checked to be those that would be computed
    return [key for key in differing if not key.startswith("run.") and key != "objective.target.cache"]


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        yield key, value
        return
    for name, below in value.items():
        yield from _leaves(below, f"{key}.{name}" if key else name)


def _values(config: AnyConfig) -> dict[str, Any]:
    """Every value by its dotted key, filled in from the variant."""
    values = config.model_dump(mode="json")
    if config.backbone is not None and not config.backbone.missing:
        values["backbone"] |= config.backbone.resolved()._asdict()
    return dict(_leaves(values))


def _origin(key: str, config: AnyConfig, stated: Stated) -> str:
    if origin := stated.origin(key):
        return origin
    if any(f"{key}.".startswith(f"{inherited}.") for inherited in _inherited(config)):
        return "checkpoint"
    return "variant" if _is_of_variant(key.split("."), config) else "default"


def _is_of_variant(keys: list[str], config: AnyConfig) -> bool:
    """Whether a key of the backbone has its value from the variant, not its default."""
    if keys[0] != "backbone" or config.backbone is None or config.backbone.variant is None:
        return False
    value: Any = config.backbone
    for key in keys[1:]:
        value = getattr(value, key)
    return value is None


def _inherited(config: AnyConfig) -> frozenset[str]:
    return frozenset() if isinstance(config, ImportedConfig) else config.inherited
