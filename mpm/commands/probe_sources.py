"""What `mpm probe` is to look at, out of its words; nothing here imports torch."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpm import configfile
from mpm.config import FinetuneConfig, ImportedConfig, PretrainConfig, ProbeConfig, Source, TokenizerConfig
from mpm.launch import is_first_process

__all__ = ["probe_config"]

log = logging.getLogger(__name__)


def probe_config(
    checkpoint: Path, *, train: Path | None, test: Path | None, words: Sequence[str]
) -> ProbeConfig:
    """The images and settings of a probe.

    Args:
        checkpoint: whose own labelled images are taken where no others are given: `data.train` and
            `data.test` of fine-tuning, `monitor.train` and `monitor.test` of pretraining.
        train: a folder with one folder a class, read in the depth of the checkpoint's images; or a
            configuration, whose images in the same place are taken, all of them.
        test: likewise.
        words: `key=value` that replace what is in `ProbeConfig`.

    Raises:
        ConfigError: if images are missing, or something is wrong.
    """
    own = _loaded(checkpoint / "config.yaml")
    if isinstance(own, TokenizerConfig):
        raise configfile.ConfigError(f"{checkpoint} is a tokenizer, not a network with features")
    data: dict[str, Any] = {
        "test_crop": 1.0 if isinstance(own, PretrainConfig) else own.data.test_crop,
        "interpolation": own.data.interpolation,
    }
    for part, given in (("train", train), ("test", test)):
        if given is not None and given.is_dir():
            data[part] = {"kind": "folder", "root": str(given), **_depth(own)}
            continue
        source = _labelled(own if given is None else _loaded(given), part)
        stated = any(word.startswith((f"data.{part}.", f"data.{part}=")) for word in words)
        if source is not None:
            data[part] = source.model_dump(mode="json")
        elif not stated:
            raise configfile.ConfigError(
                f"{given or checkpoint} names no labelled images to {part} on; give --{part} FOLDER, "
                f"with one folder a class, or data.{part}.kind=... and its other keys"
            )
    base = {"run": own.run.model_dump(mode="json"), "data": data}
    config = configfile.from_words(base, words, ProbeConfig, name=str(checkpoint))
    if isinstance(own, FinetuneConfig) and config.data.train == own.data.train and is_first_process():
        log.warning(
            "%s was fine-tuned on these training images: held-out scores, which choose, are of images it has "
            "learned; name others with --train",
            checkpoint,
        )
    return config


def _loaded(file: Path) -> configfile.AnyConfig:
    return configfile.load(file, [], configfile.model_of(file)).config


def _labelled(config: configfile.AnyConfig, part: str) -> Source | None:
    match config:
        case FinetuneConfig():
            return config.data.train if part == "train" else config.data.test
        case PretrainConfig():
            return config.monitor.train if part == "train" else config.monitor.test
        case ImportedConfig():
            return config.data.test if part == "test" else None
    return None


def _depth(config: PretrainConfig | FinetuneConfig | ImportedConfig) -> dict[str, Any]:
    """What the checkpoint's images are read with, as far as it says."""
    if isinstance(config, ImportedConfig):
        return {}
    images = config.data if isinstance(config, PretrainConfig) else config.data.train
    return images.model_dump(mode="json", include={"background", "max_value"})
