"""What fine-tuning takes from a pretrained checkpoint."""

import logging
from typing import Any

from mpm import configfile
from mpm.backbones.classifier import Classifier
from mpm.config import FinetuneConfig
from mpm.network import Trunk, part_of

__all__ = ["inherit", "start_from", "with_data"]

log = logging.getLogger(__name__)


def inherit(config: FinetuneConfig, trunk: Trunk | None) -> FinetuneConfig:
    """The configuration with what it leaves to the checkpoint, and what fine-tuning loosens.

    A fixed position table is trained from here on (MAE's fine-tuning); a relative bias that blocks share is
    copied to each (BEiT's).

    Raises:
        ValueError: if the configuration names another architecture than the checkpoint's, or does not fit it.
    """
    data = config.data
    if trunk is None:
        assert config.backbone is not None
        defaults = {"channels": 3, "mean": "imagenet", "std": "imagenet"}
        return with_data(
            config, **{key: value for key, value in defaults.items() if getattr(data, key) is None}
        )
    backbone = trunk.backbone if config.backbone is None else config.backbone.over(trunk.backbone)
    positions = backbone.positions
    loosened = positions.model_copy(
        update={
            "table": "learned" if positions.table == "sincos" else positions.table,
            "bias": "per_block" if positions.bias == "shared" else positions.bias,
        }
    )
    inherited: dict[str, Any] = {"image_size": trunk.image_size, "channels": trunk.channels}
    if data.channels in (None, trunk.channels):
        inherited |= {"mean": trunk.mean, "std": trunk.std}
    config = with_data(
        config, **{key: value for key, value in inherited.items() if getattr(data, key) is None}
    )
    if config.data.mean is None or config.data.std is None:
        raise ValueError(
            f"data.channels {config.data.channels} is not the checkpoint's {trunk.channels}; "
            f"give data.mean and data.std too: measured, or a list of {config.data.channels}"
        )
    config = config.model_copy(update={"backbone": backbone.model_copy(update={"positions": loosened})})
    merged = config.model_dump(mode="json")  # the rules hold for what came together, too
    return configfile.validate(merged, FinetuneConfig, name=f"configuration over {trunk.path}")


def start_from(trunk: Trunk, network: Classifier, config: FinetuneConfig) -> None:
    """Load the checkpoint's backbone, resampled where the images are of another size.

    A token readout takes over the norm that the checkpoint's reader had; a mean readout starts afresh.
    """
    assert config.data.channels is not None
    network.backbone.load_state_dict(trunk.weights_for(network.backbone, channels=config.data.channels))
    norm = part_of(trunk.state["predictor"] or trunk.state["readout"], "norm")
    if config.readout.kind == "token":
        network.readout.norm.load_state_dict(norm)
    log.info("starting from %s, step %d", trunk.path, trunk.step)


def with_data(config: FinetuneConfig, **update: Any) -> FinetuneConfig:
    """The configuration with some keys of its data section replaced."""
    return config.model_copy(update={"data": config.data.model_copy(update=update)})
