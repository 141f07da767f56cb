"""What the forward pass of a masked objective costs: multiply-accumulates for one image."""

from mpm.backbones.cost import backbone_macs, blocks_macs, linear_macs
from mpm.objectives.latent import LatentPrediction
from mpm.objectives.masked import MaskedPrediction
from mpm.objectives.predictors import ClassPretrainingPredictor, DecoderPredictor, LinearPredictor, Predictor

__all__ = ["masked_macs"]


def masked_macs(objective: MaskedPrediction | LatentPrediction, *, num_masked: int) -> int:
    """Of backbone and predictor, in their present mode; a teacher's pass is not in it.

    Args:
        objective: of parts that are ours.
        num_masked: M.

    Raises:
        ValueError: if the cost of a part is unknown.
    """
    backbone, predictor = objective.backbone, objective.predictor
    M = num_masked
    K = backbone.grid[0] * backbone.grid[1] - M
    if predictor.encoder_mask_token is None:
        encoder = backbone_macs(backbone, visible=K)
    else:
        read = M if predictor.reads == "masked" else None
        encoder = backbone_macs(backbone, visible=K, tokens=K + M, read=read)
    return encoder + _predictor_macs(predictor, backbone.num_prefix, K, M)


def _predictor_macs(predictor: Predictor, R: int, K: int, M: int) -> int:
    """R prefix tokens, K visible patches, M masked ones."""
    match predictor:
        case LinearPredictor():
            return linear_macs(predictor.head, M)
        case ClassPretrainingPredictor():
            blocks = blocks_macs(list(predictor.blocks), R + K + M, rows=M)
            return blocks + linear_macs(predictor.head, 2 * M)
        case DecoderPredictor():
            blocks = blocks_macs(list(predictor.blocks), R + K + M, rows=M)
            return linear_macs(predictor.embed, R + K) + blocks + linear_macs(predictor.head, M)
    name = type(predictor).__name__
    raise ValueError(f"the cost of {name} is unknown; count it in mpm.objectives.cost")
