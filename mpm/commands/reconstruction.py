"""`mpm reconstruct`: what a pretrained network sees behind the mask."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from mpm import build, checkpoint, distributed
from mpm.commands.inference import ImageFiles, image_files, readable_views
from mpm.config import FolderSource, PretrainConfig
from mpm.data.channels import to_unit_range
from mpm.data.views import EvalView
from mpm.network import config_of
from mpm.objectives.pictures import reconstructions
from mpm.patchify.masks import PatchMask
from mpm.patchify.pixels import Normalize
from mpm.run import write_picture

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
    assert data.mean is not None and data.std is not None
    normalize = Normalize(*build.statistics(data.mean, data.std)).to(place)
    target = build.target(config, normalize)
    objective = build.objective(config, target.out_dim).to(place).eval()
    objective.load_state_dict(saved.model)

    files = image_files(paths)
    if len(files) > _MOST:
        log.info("showing the first %d of %d images", _MOST, len(files))
    depth = (
        {"background": data.background, "max_value": data.max_value} if isinstance(data, FolderSource) else {}
    )
    source = ImageFiles(files[:_MOST], {"channels": data.channels, **depth})
    view = EvalView(data.image_size, crop=1.0, interpolation=data.interpolation)
    images = torch.cat([to_unit_range(views) for _, views in readable_views(source, view, workers=0)])

    sampler, rng = build.mask_sampler(config), np.random.default_rng(seed)
    masked = torch.from_numpy(np.stack([sampler(rng) for _ in images]))
    mask = PatchMask.from_bool(masked.to(place), config.num_masked)
    picture = reconstructions(objective, target, images.to(place), mask, normalize=normalize)
    write_picture(output, picture)
    log.info(
        "wrote %s: %d images, %d could not be read; rows: original, masked, reconstructed",
        output,
        len(images),
        len(source) - len(images),
    )
