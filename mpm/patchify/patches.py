"""Images to patches and back."""

from einops import rearrange
from torch import Tensor

__all__ = ["grid_of", "patchify", "unpatchify"]


def grid_of(image_size: tuple[int, int], patch_size: tuple[int, int]) -> tuple[int, int]:
    """Patches per side (rows, columns) of an image.

    Args:
        image_size: height and width in pixels.
        patch_size: height and width of a patch in pixels.

    Raises:
        ValueError: if a side is not a multiple of the patch.
    """
    for image, patch in zip(image_size, patch_size, strict=True):
        if image % patch:
            below = image // patch * patch
            sizes = f"{below} or {below + patch}" if below else f"{patch}"
            raise ValueError(f"image_size {image} is not a multiple of patch_size {patch}; use {sizes}")
    return image_size[0] // patch_size[0], image_size[1] // patch_size[1]


def patchify(images: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Cut images into patches.

    Args:
        images: [B,C,H,W].
        patch_size: height and width of a patch in pixels.

    Returns: [B,N,P*P*C], patches row-major, pixels of a patch in the order (row, column, channel).
    """
    return rearrange(images, "b c (gh ph) (gw pw) -> b (gh gw) (ph pw c)", ph=patch_size[0], pw=patch_size[1])


def unpatchify(patches: Tensor, patch_size: tuple[int, int], *, grid: tuple[int, int]) -> Tensor:
    """Put patches together again, the inverse of `patchify`.

    Args:
        patches: [B,N,P*P*C].
        patch_size: height and width of a patch in pixels.
        grid: patches per side (rows, columns).

    Returns: [B,C,H,W].
    """
    return rearrange(
        patches,
        "b (gh gw) (ph pw c) -> b c (gh ph) (gw pw)",
        gh=grid[0],
        gw=grid[1],
        ph=patch_size[0],
        pw=patch_size[1],
    )
