"""The published sizes of vision transformers: plain data, so that checking a configuration needs no torch."""

from typing import NamedTuple

__all__ = ["VARIANTS", "Sizes"]


class Sizes(NamedTuple):
    """What a variant fixes.

    Attributes:
        patch_size: height and width of a patch in pixels.
        dim: width of a token.
        depth: blocks.
        heads: attention heads of a block.
        mlp_ratio: hidden width of a block's MLP over `dim`.
    """

    patch_size: tuple[int, int]
    dim: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0


# Ti, S, B: DeiT (arXiv:2012.12877, table 1). L: ViT (arXiv:2010.11929, table 1). H/14: MAE (arXiv:2111.06377)
VARIANTS: dict[str, Sizes] = {
    "vit_ti": Sizes((16, 16), dim=192, depth=12, heads=3),
    "vit_s": Sizes((16, 16), dim=384, depth=12, heads=6),
    "vit_b": Sizes((16, 16), dim=768, depth=12, heads=12),
    "vit_l": Sizes((16, 16), dim=1024, depth=24, heads=16),
    "vit_h": Sizes((14, 14), dim=1280, depth=32, heads=16),
    "debug": Sizes((4, 4), dim=32, depth=2, heads=2),
}
