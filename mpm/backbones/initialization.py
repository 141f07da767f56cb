"""How parameters start, all in one place."""

import math
from typing import Literal

from torch import nn

from mpm.backbones.blocks import AttentionBranch, Block, MlpBranch, ParallelBlock
from mpm.patchify.stems import ConvStem, HierarchicalMLPStem, LinearStem

__all__ = ["Initialization", "initialize"]

Initialization = Literal["vit", "mae", "beit", "beit_finetuning"]


def initialize(module: nn.Module, scheme: Initialization, *, blocks_before: int = 0) -> None:
    """Give every parameter and buffer of a module its start value.

    | | vit (DeiT, timm) | mae | beit |
    |---|---|---|---|
    | Linear weight | normal .02 | Xavier uniform, qkv as one matrix | normal .02 cut at ±.02 |
    | linear stem | torch's default | Xavier uniform | normal .02 cut at ±.02 |
    | other stems | torch's default | torch's default | normal .02 cut at ±.02 |
    | biases | 0 (stems: torch's default) | 0 (other stems: torch's default) | 0 |
    | tokens, learned positions | normal .02 | normal .02 | normal .02 cut at ±.02 |
    | attn.proj and mlp.fc2 of block l = 1.., in all its branches | - | - | divided by sqrt(2 l) |
    | norms 1 and 0, LayerScale its value, relative bias 0 | | | |

    `beit_finetuning` (BEiT's classifiers) is vit with beit's division by depth.

    `blocks_before` is the number of blocks below the module's first one, for l.

    Sources: deit/models.py and timm; arXiv:2111.06377 App. A; arXiv:2106.08254 with the released code's
    initialisation. "normal .02" is cut at ±2, a hundred deviations, as in timm.
    """
    bound = 0.02 if scheme == "beit" else 2.0
    default = _stem_layers(module, scheme)
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d) and part not in default:
            if scheme == "mae":
                nn.init.xavier_uniform_(part.weight)
            else:
                nn.init.trunc_normal_(part.weight, std=0.02, a=-bound, b=bound)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif hasattr(part, "reset_parameters"):
            part.reset_parameters()  # type: ignore[operator]
        for name, parameter in part.named_parameters(recurse=False):
            if name.endswith(("tokens", "token")) or name == "table":  # of learned positions
                nn.init.trunc_normal_(parameter, std=0.02, a=-bound, b=bound)
    if scheme in ("beit", "beit_finetuning"):
        blocks = [block for block in module.modules() if isinstance(block, Block | ParallelBlock)]
        for depth, block in enumerate(blocks, start=blocks_before + 1):
            for part in block.modules():
                if isinstance(part, Block | AttentionBranch):
                    part.attn.proj.weight.data.div_(math.sqrt(2 * depth))
                if isinstance(part, Block | MlpBranch):
                    part.mlp.fc2.weight.data.div_(math.sqrt(2 * depth))


def _stem_layers(module: nn.Module, scheme: Initialization) -> set[nn.Module]:
    """The layers of stems that keep torch's default (Kaiming uniform, as their convolutions have it)."""
    match scheme:
        case "beit":
            kinds: tuple[type, ...] = ()
        case "mae":
            kinds = (HierarchicalMLPStem, ConvStem)
        case "vit" | "beit_finetuning":
            kinds = (LinearStem, HierarchicalMLPStem, ConvStem)
    return {layer for stem in module.modules() if isinstance(stem, kinds) for layer in stem.modules()}
