"""Files that a command writes: whole, or as they were."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["appearing"]


@contextmanager
def appearing(*outputs: Path) -> Iterator[tuple[Path, ...]]:
    """Places to write to, one for each output; the outputs appear together at the end of the block.

    What stood there stays until then, and for good where the block fails. All outputs get the mode of the
    first one, since safetensors writes for its owner alone.
    """
    partials = tuple(output.with_name(f"{output.name}.partial") for output in outputs)
    try:
        yield partials
        for partial in partials:
            shutil.copymode(partials[0], partial)
        for partial, output in zip(partials, outputs, strict=True):
            partial.replace(output)
    finally:
        for partial in partials:
            partial.unlink(missing_ok=True)
