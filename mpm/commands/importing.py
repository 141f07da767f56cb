"""`mpm import`: weights that others trained, as a checkpoint that every command takes."""

import textwrap
from pathlib import Path

from mpm.imported import fetch, write_imported
from mpm.interop.official import Report

__all__ = ["import_weights"]


def import_weights(
    source: str,
    folder: Path,
    *,
    heads: int | None = None,
    decoder_heads: int | None = None,
    image_size: tuple[int, int] | None = None,
) -> str:
    """Write the folder and tell what became of every weight.

    Args:
        source: a file, a folder of transformers, or `timm:NAME`.
        folder: to write; it must not exist, or be empty.
        heads: attention heads, where they cannot be told from the weights.
        decoder_heads: of MAE's decoder, likewise.
        image_size: height and width in pixels, likewise.

    Raises:
        FileNotFoundError: if there is nothing.
        FileExistsError: if the folder is not empty.
        ValueError: if the weights cannot be read safely, or something in them is not understood.
    """
    official = fetch(source, heads=heads, decoder_heads=decoder_heads, image_size=image_size)
    config = write_imported(official, folder, source=source)
    trunk, data = config.backbone.resolved(), config.data
    kind = f"classifier of {config.num_classes:,} classes" if config.num_classes else "pretrained encoder"
    height, width = data.image_size
    facts = {
        "family": f"{config.family}, {kind}",
        "network": f"{trunk.depth} blocks"
        + (f" of {trunk.branches} branches" if trunk.branches > 1 else "")
        + f", width {trunk.dim}, {trunk.heads} heads, patch {trunk.patch_size[0]}x{trunk.patch_size[1]}"
        + (", distillation token" if trunk.distillation_token else ""),
        "images": f"{height}x{width}, {data.channels} channels, "
        f"mean {_numbers(data.mean)}, std {_numbers(data.std)}",
        **_told(official.report),
        "wrote": f"{folder}; use it as init.checkpoint={folder}, or with any command of mpm",
    }
    column = max(map(len, facts)) + 2
    return "\n".join(
        textwrap.fill(f"{name:<{column}}{fact}", 110, subsequent_indent=" " * column, break_on_hyphens=False)
        for name, fact in facts.items()
    )


def _told(report: Report) -> dict[str, str]:
    told = {"loaded": f"{len(report.loaded)} tensors"}
    told |= {
        name: ", ".join(keys) for name in ("resized", "dropped", "missing") if (keys := getattr(report, name))
    }
    return told | {f"note {number}": note for number, note in enumerate(report.notes, start=1)}


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:g}" for value in values)
