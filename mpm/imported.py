"""Weights that others trained, in mpm's form: read where they lie, or written to a folder."""

from pathlib import Path
from typing import Any

from mpm import checkpoint, configfile
from mpm.config import ImportedConfig
from mpm.interop.files import NotWeights
from mpm.interop.official import Official, load_official
from mpm.interop.timm_hub import load_timm

__all__ = ["TIMM", "fetch", "imported_config", "write_imported"]

TIMM = "timm:"


def fetch(
    source: str | Path,
    *,
    heads: int | None = None,
    decoder_heads: int | None = None,
    image_size: tuple[int, int] | None = None,
) -> Official:
    """Weights of a file, of a folder of transformers, or of timm.

    Args:
        source: a path, or `timm:NAME` (`timm:hf-hub:owner/name` too), which may download.
        heads: attention heads, where they cannot be told from the weights.
        decoder_heads: of MAE's decoder, likewise.
        image_size: height and width in pixels, where they cannot be told, or positions are to be resampled.

    Raises:
        FileNotFoundError: if there is nothing.
        ValueError: if it cannot be read safely, or something in it is not understood.
    """
    if str(source).startswith(TIMM):
        return load_timm(str(source).removeprefix(TIMM), image_size=image_size)
    path = Path(source).expanduser()
    if not path.exists():
        raise FileNotFoundError(
            f"no checkpoint {path}; give a run's folder, a file of weights, or {TIMM}NAME"
        )
    try:
        return load_official(path, heads=heads, decoder_heads=decoder_heads, image_size=image_size)
    except NotWeights as error:
        raise ValueError(f"{error}; give a run's folder, a file of weights, or {TIMM}NAME") from error
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path}: {error}") from error


def imported_config(official: Official, *, source: str | Path, folder: str | Path = ".") -> ImportedConfig:
    """The configuration of weights as mpm keeps it."""
    theirs = official.config
    data = {key: theirs[key] for key in ("image_size", "channels", "mean", "std", "interpolation")}
    raw: dict[str, Any] = {
        "source": str(source),
        "family": theirs["family"],
        "run": {"output_dir": str(folder)},
        "data": data | {"test_crop": theirs["crop"]},
        "backbone": _section(theirs["backbone"]),
        "readout": theirs["readout"],
        "num_classes": theirs["num_classes"],
        "predictor": theirs["predictor"],
    }
    return configfile.validate(raw, ImportedConfig, name=str(source))


def _section(architecture: dict[str, Any]) -> dict[str, Any]:
    """An architecture as a `backbone` section."""
    scale = architecture["layer_scale"]
    return architecture | {"layer_scale": "none" if scale is None else scale}


def write_imported(official: Official, folder: Path, *, source: str | Path) -> ImportedConfig:
    """Write a checkpoint's folder that every command of mpm takes.

    Raises:
        FileExistsError: if the folder exists and is not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; choose another folder")
    config = imported_config(official, source=source, folder=folder)
    if folder.exists():
        folder.rmdir()
    checkpoint.write(
        folder,
        config=config.model_dump(mode="json"),
        metadata={
            "kind": "imported",
            "classes": list(official.config["classes"]),
            "report": official.report._asdict(),
        },
        model=official.state,
    )
    return config
