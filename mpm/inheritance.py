"""What fine-tuning takes from a pretrained checkpoint."""

import logging
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpm import build, configfile, distributed
from mpm.backbones.classifier import Classifier
from mpm.config import ClassAttentionReadout, FinetuneConfig, Positions, Readout, TokenReadout
from mpm.data.datasets import ImageSource
from mpm.data.loading import eval_loader
from mpm.data.subsets import Subset
from mpm.data.substitution import Substituting
from mpm.data.views import EvalView
from mpm.patchify.norms import recalibrate
from mpm.patchify.pixels import Moments, Normalize, to_unit
from mpm.trunk import Trunk

__all__ = ["has_fresh_readout", "inherit", "recalibrate_stem", "start_from", "with_statistics"]

log = logging.getLogger(__name__)

_BATCH = 256
_BATCHES = 20


def inherit(config: FinetuneConfig, trunk: Trunk | None) -> FinetuneConfig:
    """The configuration with what it leaves to the checkpoint, and what fine-tuning loosens.

    A fixed position table is trained from here on (MAE's fine-tuning); a relative bias that blocks share is
    copied to each (BEiT's).

    Raises:
        ValueError: if the configuration names another architecture than the checkpoint's, or does not fit it.
    """
    data = config.data
    if trunk is None:
        defaults = {"channels": 3, "mean": "imagenet", "std": "imagenet"}
        return _with_data(
            config, **{key: value for key, value in defaults.items() if getattr(data, key) is None}
        )
    backbone = trunk.backbone if config.backbone is None else config.backbone.over(trunk.backbone)
    loosened = Positions(**backbone.resolved().for_fine_tuning().positions)
    inherited: dict[str, Any] = {"image_size": trunk.image_size, "channels": trunk.channels}
    if data.channels in (None, trunk.channels):
        inherited |= {"mean": trunk.mean, "std": trunk.std}
    config = _with_data(
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


def start_from(trunk: Trunk, network: Classifier, config: FinetuneConfig, classes: tuple[str, ...]) -> None:
    """Load the checkpoint's backbone, resampled for images of another size, and what still fits of the rest.

    A readout of the same kind is the checkpoint's; where class attention gets a second query, that one starts
    afresh. A token readout also takes over the norm that pretraining predicted from; a mean readout after
    another one starts afresh. The heads are the checkpoint's where the readout and the classes are: by name,
    or by number where the checkpoint does not name them.
    """
    assert config.data.channels is not None
    network.backbone.load_state_dict(trunk.weights_for(network.backbone, channels=config.data.channels))
    inherited, fresh = ["backbone"], []
    if _is_same_reader(trunk.readout, config.readout):
        readout = network.get_submodule("readout")
        readout.load_state_dict(_with_rows(trunk.state["readout"], readout.state_dict()))
        inherited.append("readout")
        by_number = not trunk.classes and trunk.num_classes == len(classes)
        if config.head_norm == "batch":
            fresh.append("heads, which now read normed vectors")
        elif trunk.classes == classes or by_number:
            heads = network.heads.state_dict()
            network.heads.load_state_dict(
                heads | {k: t for k, t in trunk.state["heads"].items() if k in heads}
            )
            inherited.append("heads, by the number of classes" if by_number else "heads")
        else:
            fresh.append("heads, whose classes are others")
    else:
        fresh.append("readout and heads")
        if isinstance(config.readout, TokenReadout) and trunk.norm:
            network.readout.norm.load_state_dict(trunk.norm)
            inherited.append("norm")
    log.info(
        "starting from %s, step %d: %s%s",
        trunk.path,
        trunk.step,
        ", ".join(inherited),
        f"; afresh: {', '.join(fresh)}" if trunk.readout is not None and fresh else "",
    )


def has_fresh_readout(trunk: Trunk | None, config: FinetuneConfig) -> bool:
    """Whether a readout of class attention, or a query of it, has no weights in the checkpoint."""
    return isinstance(config.readout, ClassAttentionReadout) and (
        trunk is None or trunk.readout != config.readout
    )


def _is_same_reader(theirs: Readout | None, ours: Readout | None) -> bool:
    """Whether weights fit, but for the number of queries."""
    if isinstance(theirs, ClassAttentionReadout) and isinstance(ours, ClassAttentionReadout):
        theirs = theirs.model_copy(update={"queries": ours.queries})
    return theirs == ours


def _with_rows(theirs: dict[str, Tensor], ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """A readout's state whose tokens are as many as ours; the first are theirs."""
    if "tokens" not in ours:
        return theirs
    tokens = ours["tokens"].clone()
    count = min(len(tokens), len(theirs["tokens"]))
    tokens[:count] = theirs["tokens"][:count]
    return theirs | {"tokens": tokens}


def _with_data(config: FinetuneConfig, **update: Any) -> FinetuneConfig:
    """The configuration with some keys of its data section replaced."""
    return config.model_copy(update={"data": config.data.model_copy(update=update)})


def with_statistics(config: FinetuneConfig, images: ImageSource) -> tuple[FinetuneConfig, Moments]:
    """The configuration with numbers for the mean and deviation of its data, and these numbers."""
    assert config.data.mean is not None and config.data.std is not None
    mean, std = build.statistics(config.data.mean, config.data.std, images)
    return _with_data(config, mean=mean, std=std), (mean, std)


def recalibrate_stem(
    network: Classifier,
    images: ImageSource,
    config: FinetuneConfig,
    *,
    normalize: Normalize,
    device: torch.device,
) -> None:
    """Statistics of a stem's batch norm from whole training images, where pretraining masked them.

    They are of at most 20 batches of 256 images a process, drawn from all of them: sources lie in the order
    of their classes.
    """
    assert config.data.image_size is not None
    count = min(len(images), distributed.world_size() * _BATCHES * _BATCH)
    drawn = np.random.default_rng(config.seed).permutation(len(images))[:count]
    view = EvalView(config.data.image_size, crop=1.0, interpolation=config.data.interpolation)
    some = Substituting(Subset(images, drawn.tolist()))
    loader = eval_loader(some, view, batch_size=_BATCH, workers=config.run.workers)
    # as many as every process has: the statistics are reduced over processes
    whole = max(1, count // (distributed.world_size() * _BATCH))
    batches = (normalize(to_unit(batch.images, device)) for batch in islice(loader, whole))
    recalibrate(network.backbone.get_submodule("stem"), batches)
