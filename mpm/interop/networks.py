"""The network that facts describe, part by part."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from mpm.backbones.create import create_backbone, create_readout
from mpm.objectives.predictors import create_predictor
from mpm.variants import Architecture

__all__ = ["network_of"]


def network_of(config: Mapping[str, Any], *, out_dim: int = 0) -> nn.ModuleDict:
    """The parts of a network under the names that its state has; parameters are not initialised.

    Args:
        config: facts as `load_official` gives them.
        out_dim: width of a prediction, where it has a predictor.
    """
    trunk = Architecture(**config["backbone"])
    image_size, predictor = config["image_size"], config["predictor"]
    backbone = create_backbone(trunk, image_size=image_size, channels=config["channels"])
    parts = nn.ModuleDict({"backbone": backbone})
    if config["readout"] is not None:
        readout: Any = create_readout(trunk, **config["readout"])
        parts["readout"] = readout
        classes = config["num_classes"]
        if classes is not None:
            parts["heads"] = nn.ModuleList(nn.Linear(trunk.dim, classes) for _ in range(readout.num_vectors))
    if predictor is not None:
        built: Any = create_predictor(trunk, out_dim=out_dim, grid=backbone.grid, **predictor)
        parts["predictor"] = built
    return parts
