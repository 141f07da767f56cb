"""`mpm export`: a trained network for other programs."""

from pathlib import Path
from typing import Any

from mpm import configfile
from mpm.config import ImportedConfig, PixelTarget, PretrainConfig, TokenizerConfig
from mpm.interop.export import export
from mpm.interop.inference import Subject
from mpm.trunk import read_trunk

__all__ = ["export_checkpoint", "subject_of"]


def export_checkpoint(checkpoint: Path, output: Path, *, to: str) -> str:
    """Write a network and its card, and tell how exact it is.

    Args:
        checkpoint: of pretraining, fine-tuning or `mpm import`.
        output: file or folder.
        to: a key of `mpm.interop.export.FORMATS`.

    Raises:
        FileNotFoundError: if there is no checkpoint, or no folder to write to.
        FileExistsError: if the folder to write is not empty.
        ValueError: if the format has no such network, or what was written is not exact.
    """
    exported = export(subject_of(checkpoint), output, to=to)
    return (
        f"wrote {exported.path}; loaded again, it differs by at most {exported.difference:.1g} "
        f"({exported.relative:.1g} of the largest output); how to load it: {exported.card}"
    )


def subject_of(checkpoint: Path) -> Subject:
    """The network of a checkpoint as it is exported: a classifier, or what was pretrained."""
    trunk = read_trunk(checkpoint)
    file = trunk.path / "config.yaml"
    config = configfile.load(file, [], configfile.model_of(file)).config
    assert not isinstance(config, TokenizerConfig)  # read_trunk has refused it
    training: dict[str, Any] = {}
    predictor, predicted = None, None
    if isinstance(config, PretrainConfig):
        predictor, target = config.objective.predictor, config.objective.target
        predicted = target.kind
        if predictor.kind == "decoder" and isinstance(target, PixelTarget):  # of ViTMAE's config.json
            training["mask_ratio"] = config.num_masked / config.num_patches
            training["norm_pix_loss"] = target.normalize_patches
    elif isinstance(config, ImportedConfig):
        predictor = config.predictor
    facts = {
        "family": config.family if isinstance(config, ImportedConfig) else "mpm",
        "image_size": trunk.image_size,
        "channels": trunk.channels,
        "mean": trunk.mean,
        "std": trunk.std,
        "crop": 1.0 if isinstance(config, PretrainConfig) else config.data.test_crop,
        "interpolation": config.data.interpolation,
        "backbone": trunk.backbone.resolved()._asdict(),
        "readout": None if trunk.readout is None else trunk.readout.model_dump(),
        "num_classes": trunk.num_classes or None,
        "predictor": None if predictor is None else predictor.model_dump(),
    }
    steps = f", step {trunk.step}" if trunk.step else ""
    return Subject(facts, trunk.weights, trunk.classes, f"{checkpoint}{steps}", training, predicted)
