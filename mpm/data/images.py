"""Reading image files: JPEG, PNG, WebP, TIFF and .npy, of 8 bits or deeper, with any number of channels."""

import io
import os
import struct
import warnings
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mpm.data.channels import as_stored_depth, with_channels

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".npy")

# What the decoders below raise on damaged files, as far as the libraries let one know.
_DECODER_ERRORS = (
    OSError,
    EOFError,
    ValueError,
    RuntimeError,
    SyntaxError,
    LookupError,
    TypeError,
    struct.error,
    zlib.error,
)


class UnreadableImage(ValueError):
    """A file that holds no readable image: damaged, truncated, missing or of an unknown format."""


def legible(path: str | bytes | os.PathLike[str]) -> str:
    r"""A path as text that can be written anywhere: bytes that are not UTF-8 become \xE9 and the like."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


class _Decoded(NamedTuple):
    pixels: Tensor | np.ndarray  # [C,H,W]
    has_alpha: bool  # the last channel is opacity


def read_image(
    path: str | os.PathLike[str],
    *,
    channels: int,
    background: Sequence[int] = (255, 255, 255),
    max_value: float | None = None,
) -> Tensor:
    """Read one image. The format follows from the content, not from the name.

    EXIF rotation is applied, palettes are expanded, transparency is laid on `background`. Colour and grey are
    converted to each other; a file that has exactly `channels` is never converted.

    Args:
        path: JPEG, PNG, WebP, TIFF ([H,W], [H,W,C] or [C,H,W]) or .npy ([H,W] or [H,W,C]).
        channels: of the result.
        background: red, green, blue in 0..255.
        max_value: the stored value that becomes 1. None: the largest of an integer type, 1 for floats.

    Returns:
        [channels,H,W], uint8 for 8-bit files, float32 in [0, 1] for deeper ones or another `max_value`.

    Raises:
        UnreadableImage: if the file is damaged, missing, or in no known format.
        ValueError: if its channels or values do not fit what was asked for.
    """
    name = legible(path)
    pixels, has_alpha = _decoded(path, channels)
    if isinstance(pixels, np.ndarray) and pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
        raise UnreadableImage(f"cannot read {name}: it holds values that are not finite")
    pixels = as_stored_depth(pixels, max_value=max_value, name=name)
    return with_channels(pixels, channels, has_alpha=has_alpha, background=background, name=name)


class Stored(NamedTuple):
    """How a file keeps its image.

    Attributes:
        channels: of the picture, opacity not counted.
        dtype: "uint8", "uint16", "float32", ...
        minimum: smallest value.
        maximum: largest value.
    """

    channels: int
    dtype: str
    minimum: float
    maximum: float


def stored_image(path: str | os.PathLike[str]) -> Stored:
    """What a file holds, before any conversion.

    Raises:
        UnreadableImage: as `read_image`.
    """
    pixels, has_alpha = _decoded(path, channels=0)
    values = torch.as_tensor(pixels.astype(np.float64)) if isinstance(pixels, np.ndarray) else pixels
    minimum, maximum = torch.aminmax(values.double())
    return Stored(
        len(pixels) - has_alpha, str(pixels.dtype).removeprefix("torch."), float(minimum), float(maximum)
    )


def _decoded(path: str | os.PathLike[str], channels: int) -> _Decoded:
    try:
        return _decode(np.fromfile(path, dtype=np.uint8), channels)
    except _DECODER_ERRORS as error:
        reason = str(error).split("\n")[0] or type(error).__name__
        raise UnreadableImage(f"cannot read {legible(path)}: {reason}") from error


def _decode(data: np.ndarray, channels: int) -> _Decoded:
    head = data[:16].tobytes()
    if head.startswith(b"\xff\xd8\xff"):
        return _decode_jpeg(data, channels)
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return _decode_png(data)
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return _decode_with_pillow(data)
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return _decode_tiff(data, channels)
    if head.startswith(b"\x93NUMPY"):
        return _decode_npy(data)
    raise UnreadableImage("empty file" if not head else "not a JPEG, PNG, WebP, TIFF or .npy file")


def _decode_jpeg(data: np.ndarray, channels: int) -> _Decoded:
    return _Decoded(
        _decode_with_torchvision(data, {1: "GRAY", 3: "RGB"}.get(channels, "UNCHANGED")), has_alpha=False
    )


def _decode_png(data: np.ndarray) -> _Decoded:
    # torchvision returns palette indices for colours, or rows of the wrong length, and overlooks transparency
    # kept in a chunk of its own. Pillow knows both, but would crush 16 bits: there such a chunk is ignored.
    raw = data.tobytes()
    bit_depth, is_palette = raw[24], raw[25] == 3
    if is_palette or (bit_depth <= 8 and raw.find(b"tRNS", 0, raw.find(b"IDAT")) >= 0):
        return _decode_with_pillow(data)
    pixels = _decode_with_torchvision(data, "UNCHANGED")
    return _Decoded(pixels, has_alpha=len(pixels) in (2, 4))


def _decode_with_torchvision(data: np.ndarray, mode: str) -> Tensor:
    from torchvision.io import ImageReadMode, decode_image

    with warnings.catch_warnings():
        # From 0.29 on torchvision points to TorchCodec, another package; its decoders take a quarter less
        # time than Pillow's.
        warnings.simplefilter("ignore", DeprecationWarning)
        return decode_image(torch.from_numpy(data), ImageReadMode[mode], apply_exif_orientation=True)


def _decode_with_pillow(data: np.ndarray) -> _Decoded:
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(data.tobytes())) as file:
        image = ImageOps.exif_transpose(file)
    has_alpha = image.has_transparency_data
    image = image.convert("RGBA" if has_alpha else "L" if image.mode in ("1", "L") else "RGB")
    pixels = torch.from_numpy(np.array(image))  # [H,W] or [H,W,C]
    return _Decoded(pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1), has_alpha)


def _decode_tiff(data: np.ndarray, channels: int) -> _Decoded:
    import tifffile

    with tifffile.TiffFile(io.BytesIO(data.tobytes())) as file:
        page = file.pages.first
        series = file.series[0]
        is_picture = page.bitspersample <= 8 and page.samplesperpixel <= 4 and len(file.pages) == 1
        if is_picture and channels in (1, 3):
            # Pillow brings the codecs, palettes and rotation of photographs, and would crush anything deeper.
            return _decode_with_pillow(data)
        pixels = series.asarray()
        unassociated_alpha = 2
        has_alpha = page.extrasamples[-1:] == (unassociated_alpha,)
    if pixels.ndim == 2:
        return _Decoded(pixels[None], has_alpha=False)
    if pixels.ndim != 3:
        raise UnreadableImage(f"{series.axes} TIFF of shape {pixels.shape} is not one image")
    # Interleaved samples come last, pages and planes first; [H,W,C] written as H pages is told by its size.
    samples_last = series.axes.endswith("S") or (pixels.shape[0] != channels and pixels.shape[2] == channels)
    return _Decoded(pixels.transpose(2, 0, 1) if samples_last else pixels, has_alpha)


def _decode_npy(data: np.ndarray) -> _Decoded:
    pixels = np.load(io.BytesIO(data.tobytes()), allow_pickle=False)
    if pixels.ndim not in (2, 3):
        raise UnreadableImage(f"array of shape {pixels.shape} is neither [H,W] nor [H,W,C]")
    return _Decoded(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1), has_alpha=False)
