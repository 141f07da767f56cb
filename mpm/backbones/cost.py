"""What a forward pass costs: the multiply-accumulates of its matrix products, for one image.

The papers call them FLOPs, and leave out norms, activations and softmax as well.
"""

from collections.abc import Sequence

from torch import nn

from mpm.backbones.attention import Attention
from mpm.backbones.backbone import Backbone
from mpm.backbones.blocks import Block, ClassAttentionBlock, Mlp, ParallelBlock
from mpm.backbones.classifier import Classifier
from mpm.backbones.readouts import ClassAttentionReadout, MeanReadout, Readout, TokenReadout
from mpm.patchify.stems import ConvStem, HierarchicalMLPStem, LinearStem, Stem, merge_factors

__all__ = ["backbone_macs", "blocks_macs", "classifier_macs", "linear_macs", "stem_macs"]


def classifier_macs(classifier: Classifier) -> int:
    """Of a classifier, which is never masked."""
    backbone = classifier.backbone
    patches = backbone.grid[0] * backbone.grid[1]
    return (
        backbone_macs(backbone)
        + _readout_macs(classifier.readout, patches)
        + linear_macs(classifier.heads, 1)
    )


def backbone_macs(
    backbone: Backbone, *, visible: int | None = None, tokens: int | None = None, read: int | None = None
) -> int:
    """Of a backbone in its present mode, train or eval.

    Args:
        backbone: whose stem is one of ours, and whose blocks are `Block` or `ParallelBlock`.
        visible: patches that are not masked; None: all N.
        tokens: patch tokens in the trunk, N where mask tokens stand for hidden patches; None: as `visible`.
        read: those of them that the last block computes; None: all.

    Raises:
        ValueError: if the cost of a part is unknown.
    """
    patches, prefix = backbone.grid[0] * backbone.grid[1], backbone.num_prefix
    visible = patches if visible is None else visible
    tokens = visible if tokens is None else tokens
    computed = patches if backbone.stem.computes_hidden else visible
    rows = prefix + (tokens if read is None else read)
    return stem_macs(backbone.stem, computed) + blocks_macs(list(backbone.blocks), prefix + tokens, rows=rows)


def stem_macs(stem: Stem, patches: int) -> int:
    """Of a stem that computes so many patches.

    Raises:
        ValueError: if the stem is unknown.
    """
    match stem:
        case LinearStem():
            return linear_macs(stem, patches)
        case HierarchicalMLPStem():
            strides, layers = merge_factors(stem.patch_size[0]), stem.projs
        case ConvStem():
            strides, layers = (2,) * len(stem.convs), stem.convs
        case _:
            raise _unknown(stem)
    macs, side = 0, stem.patch_size[0]
    for stride, layer in zip(strides, layers, strict=True):
        side //= stride  # of a patch, in outputs of this layer
        macs += side**2 * layer.get_parameter("weight").numel()
    return patches * macs


def blocks_macs(blocks: Sequence[nn.Module], tokens: int, *, rows: int | None = None) -> int:
    """Of a stack of `Block` or `ParallelBlock`.

    Args:
        blocks: one after the other.
        tokens: T, prefix included.
        rows: S of them, which the last block computes; None: all.

    Raises:
        ValueError: if a block is unknown.
    """
    *first, last = blocks
    return sum(_block_macs(block, tokens, tokens) for block in first) + _block_macs(
        last, tokens if rows is None else rows, tokens
    )


def linear_macs(module: nn.Module, rows: int) -> int:
    """Of all Linear layers of a module, on so many rows each."""
    layers = (part for part in module.modules() if isinstance(part, nn.Linear))
    return rows * sum(layer.weight.numel() for layer in layers)


def _block_macs(block: nn.Module, S: int, T: int) -> int:
    """S of T tokens are computed."""
    if not isinstance(block, Block | ParallelBlock):
        raise _unknown(block)
    parts = list(block.modules())  # a parallel block has several of each
    attentions = sum(_attention_macs(part, S, T) for part in parts if isinstance(part, Attention))
    return attentions + sum(linear_macs(part, S) for part in parts if isinstance(part, Mlp))


def _attention_macs(attention: Attention, S: int, T: int) -> int:
    projections = linear_macs(attention.qkv, S + 2 * T) // 3 + linear_macs(attention.proj, S)
    mixings = linear_macs(attention.attend, S * T)  # talking heads
    return projections + mixings + 2 * S * T * attention.inner_dim


def _readout_macs(readout: Readout, patches: int) -> int:
    match readout:
        case TokenReadout() | MeanReadout():
            return 0
        case ClassAttentionReadout():
            blocks = [block for block in readout.blocks if isinstance(block, ClassAttentionBlock)]
            Q = readout.num_vectors
            return sum(_class_attention_macs(block, Q, Q + patches) for block in blocks)
    raise _unknown(readout)


def _class_attention_macs(block: ClassAttentionBlock, Q: int, T: int) -> int:
    """Q queries see T tokens."""
    attention = block.attn
    of_queries = sum(linear_macs(part, Q) for part in (attention.q, attention.proj, block.mlp))
    of_tokens = sum(linear_macs(part, T) for part in (attention.k, attention.v))
    return of_queries + of_tokens + 2 * Q * T * attention.q.out_features


def _unknown(part: object) -> ValueError:
    return ValueError(f"the cost of {type(part).__name__} is unknown; count it in mpm.backbones.cost")
