"""`mpm reconstruct`: what a pretrained network sees behind the mask."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpm import build, checkpoint, distributed
from mpm.commands.inference import ImageFiles, image_files, readable_views
from mpm.config import CodeTarget, FolderSource, LatentTarget, PretrainConfig
from mpm.data.channels import to_unit_range
from mpm.data.views import EvalView
from mpm.objectives.masked import MaskedPrediction
from mpm.objectives.pictures import reconstructions
from mpm.objectives.targets import Target
from mpm.patchify.masks import PatchMask
from mpm.patchify.pixels import Normalize
from mpm.run import write_picture
from mpm.tokenization import read_tokenizer
from mpm.tokenizers.use import code_use
from mpm.trunk import config_of

__all__ = ["reconstruct"]

log = logging.getLogger(__name__)

_MOST = 32  # columns of a picture


def reconstruct(
    path: Path, paths: Sequence[Path], *, output: Path, seed: int = 0, device: str = "auto"
) -> None:
    """Write a picture with a column per image: original, masked, reconstructed.

    Args:
        path: of a pretraining checkpoint.
        paths: images and folders of images; the first ones are shown.
        output: of the PNG.
        seed: of the masks.
        device: auto, cpu or cuda.

    Raises:
        ValueError: if no image can be read.
    """
    saved = checkpoint.load(path)
    config = config_of(saved)
    assert isinstance(config, PretrainConfig)
    place = distributed.start(device)
    data = config.data
    if isinstance(config.objective.target, LatentTarget):
        raise ValueError(f"{path} predicts latent targets, which have no picture")
    assert data.mean is not None and data.std is not None
    normalize = Normalize(*build.statistics(data.mean, data.std)).to(place)
    files = image_files(paths)
    if len(files) > _MOST:
        log.info("showing the first %d of %d images", _MOST, len(files))
    depth = (
        {"background": data.background, "max_value": data.max_value} if isinstance(data, FolderSource) else {}
    )
    source = ImageFiles(files[:_MOST], {"channels": data.channels, **depth})
    view = EvalView(data.image_size, crop=1.0, interpolation=data.interpolation)
    images = torch.cat([to_unit_range(views) for _, views in readable_views(source, view, workers=0)])

    images = images.to(place)
    target = _target(config, normalize, images)
    objective = build.objective(config, target.out_dim).to(place).eval()
    objective.load_state_dict(saved.model)
    assert isinstance(objective, MaskedPrediction)
    sampler, rng = build.mask_sampler(config), np.random.default_rng(seed)
    masked = torch.from_numpy(np.stack([sampler(rng) for _ in images]))
    mask = PatchMask.from_bool(masked.to(place), config.num_masked)
    picture = reconstructions(objective, target, images, mask, normalize=normalize)
    write_picture(output, picture)
    log.info(
        "wrote %s: %d images, %d could not be read; rows: original, masked, reconstructed",
        output,
        len(images),
        len(source) - len(images),
    )


def _target(config: PretrainConfig, normalize: Normalize, images: Tensor) -> Target:
    """What was predicted; codes that no decoder draws look like the mean of these images' patches."""
    stated = config.objective.target
    if not isinstance(stated, CodeTarget):
        return build.target(config, normalize)
    tokenizer = read_tokenizer(stated.tokenizer)
    cast(nn.Module, tokenizer).to(images.device)
    size = build.tokenizer_view(config, tokenizer)
    views = F.interpolate(images, size, mode="bilinear", antialias=True).clamp(0, 1)
    return build.code_target(config, tokenizer, code_use(tokenizer, [views]), dtype=torch.float32)
