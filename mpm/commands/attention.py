"""`mpm attention`: where a network looks."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from mpm import distributed
from mpm.backbones.attention_maps import AttentionMaps, Query
from mpm.commands.inference import ImageFiles, image_files, readable_views
from mpm.data.channels import to_unit_range
from mpm.evaluation.gallery import Scale, Tile, gallery, scaled
from mpm.evaluation.heat import colour_bar, overlay
from mpm.network import load
from mpm.objectives.pictures import displayable
from mpm.run import write_picture

__all__ = ["draw_attention"]

log = logging.getLogger(__name__)

_TILE_PX = 144


def draw_attention(
    checkpoint: Path,
    paths: Sequence[Path],
    *,
    output: Path,
    query: Query | None = None,
    image_size: tuple[int, int] | None = None,
    most: int = 8,
    device: str = "auto",
) -> None:
    """Write a picture with a row per image: the image, the mean over the heads, each head.

    Class-attention blocks and parallel branches have a row each.

    Args:
        checkpoint: of pretraining or fine-tuning.
        paths: images and folders of images; the first ones are shown.
        output: of the PNG.
        query: see `attention_maps`.
        image_size: height and width in pixels; None: that of training.
        most: images shown; the others are counted in the log.
        device: auto, cpu or cuda.

    Raises:
        ValueError: if no image can be read, or there is no class token to ask for.
    """
    network = load(checkpoint, image_size=image_size, device=distributed.start(device))
    files = image_files(paths)
    if len(files) > most:
        log.info("showing the first %d of %d images", most, len(files))
    source = ImageFiles(files[:most], network.reading)
    rows: list[list[Tile | None]] = []
    is_signed = False
    for places, views in readable_views(source, network.view, workers=0):
        for place, view in zip(places, views, strict=True):
            maps = network.attention(view[None], query=query)
            shown = scaled(displayable(to_unit_range(view)[None])[0], _TILE_PX)
            is_signed |= bool((maps.weights < 0).any())
            rows += _rows(shown, Path(source.name(place)).name, maps)
    legend = f"attention of the {maps.query}; each map up to its largest weight (max), fuller above its mean"
    if is_signed:
        legend += "; weights below 0 (talking heads) are drawn as 0"
    write_picture(output, gallery(rows, legend=legend, scale=Scale(colour_bar(), "0", "max")))
    log.info("wrote %s: %s", output, legend)


def _rows(image: Tensor, name: str, maps: AttentionMaps) -> Iterator[list[Tile | None]]:
    first: Tile | None = Tile(image, (name,))
    for group, of_heads in zip(maps.groups, maps.weights[0].cpu(), strict=True):  # [h,rows,columns]
        named = {"mean": of_heads.mean(0)} | {f"head {n}": heads for n, heads in enumerate(of_heads, start=1)}
        tiles = [
            Tile(
                overlay(image, weights), (" ".join(filter(None, [group, title])), f"max {weights.max():.2g}")
            )
            for title, weights in named.items()
        ]
        yield [first, *tiles]
        first = None
