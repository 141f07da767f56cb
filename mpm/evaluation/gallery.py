"""Rows of small pictures with words below each."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

__all__ = ["Tile", "gallery", "scaled"]

_FONT_PX, _LINE_PX, _GAP_PX = 13, 17, 8


class Tile(NamedTuple):
    """A picture with lines of text, the first in black, the others in grey.

    Attributes:
        image: uint8 [3,h,w].
        caption: lines; what is wider than the picture is shortened.
    """

    image: Tensor
    caption: tuple[str, ...] = ()


def gallery(rows: Sequence[Sequence[Tile | None]], *, legend: str, bar: Tensor | None = None) -> Tensor:
    """Tiles of one size in rows, with a line below all that says what they are.

    Args:
        rows: None leaves a place empty.
        legend: the line.
        bar: uint8 [3,h,w], drawn before the legend, as a scale of colours.

    Returns: uint8 [3,H,W].
    """
    tiles = [tile for row in rows for tile in row if tile is not None]
    _, h, w = tiles[0].image.shape
    lines = max(len(tile.caption) for tile in tiles)
    below = lines * _LINE_PX + _GAP_PX // 2 if lines else 0
    step_y, step_x = h + below + _GAP_PX, w + _GAP_PX
    font = ImageFont.load_default(_FONT_PX)
    indent = _GAP_PX + (bar.shape[2] + _GAP_PX if bar is not None else 0)
    told = int(font.getlength(legend)) + indent + _GAP_PX
    size = (max(max(map(len, rows)) * step_x + _GAP_PX, told), len(rows) * step_y + _LINE_PX + 2 * _GAP_PX)
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    for number, row in enumerate(rows):
        for place, tile in enumerate(row):
            if tile is None:
                continue
            x, y = _GAP_PX + place * step_x, _GAP_PX + number * step_y
            picture.paste(_pillow(tile.image), (x, y))
            for line, text in enumerate(tile.caption):
                corner = (x, y + h + _GAP_PX // 2 + line * _LINE_PX)
                draw.text(corner, _fitting(text, w, font), fill="grey" if line else "black", font=font)
    bottom = size[1] - _GAP_PX - _LINE_PX / 2
    if bar is not None:
        picture.paste(_pillow(bar), (_GAP_PX, round(bottom - bar.shape[1] / 2)))
    draw.text((indent, bottom), legend, fill="grey", font=font, anchor="lm")
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).contiguous()


def scaled(image: Tensor, height: int) -> Tensor:
    """A picture of about another height, its aspect kept; pixels of small ones grow by a whole number.

    Args:
        image: uint8 [3,h,w].
        height: in pixels.
    """
    h, w = image.shape[-2:]
    if h < height:
        times = max(1, round(height / h))
        return image.repeat_interleave(times, -2).repeat_interleave(times, -1)
    size = (max(1, round(w * height / h)), height)
    resized = _pillow(image).resize(size, Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(resized).copy()).permute(2, 0, 1)


def _pillow(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def _fitting(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"
