"""What every section of a configuration shares: strictness, and types with their rules."""

from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Strict

__all__ = [
    "Count",
    "Fraction",
    "Location",
    "NotNegative",
    "Pair",
    "Positive",
    "Probability",
    "Range",
    "Section",
    "Seed",
    "check_multiple",
    "multiples_near",
]


class Section(BaseModel):
    """A frozen group of keys. Unknown keys and wrong types are errors: no text for a number, no 1 for yes."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    alternatives: ClassVar[dict[str, str]] = {}
    """Keys that state one thing in two units: an override of one replaces the other."""
    is_default_kind: ClassVar[bool] = False
    """Whether this section is meant where others may stand too and no `kind` is stated."""


def _square(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return value, value
    raise ValueError(f"{value!r} is neither a whole number nor [height, width]")


def _ascending(bounds: tuple[float, float]) -> tuple[float, float]:
    if bounds[0] > bounds[1]:
        raise ValueError(f"{list(bounds)} does not ascend; use [{bounds[1]:g}, {bounds[0]:g}]")
    return bounds


Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
Location = Annotated[Path, Strict(False), AfterValidator(Path.expanduser)]
# a number, or height and width
Pair = Annotated[tuple[Count, Count], Strict(False), BeforeValidator(_square)]
Range = Annotated[tuple[Positive, Positive], Strict(False), AfterValidator(_ascending)]


def multiples_near(value: int, step: int) -> str:
    """The legal neighbours of a value that must be a multiple of `step`: "210 or 225"."""
    below = value // step * step
    return f"{below} or {below + step}" if below else f"{step}"


def check_multiple(name: str, value: int, step: int, *, of: str) -> None:
    """Refuse a value that `step` does not divide, naming it and what it must be a multiple of.

    Raises:
        ValueError: with the nearest legal values.
    """
    if value % step:
        raise ValueError(f"{name} {value} is not a multiple of {of}; use {multiples_near(value, step)}")
