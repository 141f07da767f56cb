"""What the objective of a pretraining run is given, step by step."""

from typing import NamedTuple

import torch
from torch import Tensor

from mpm import build
from mpm.config import PretrainConfig
from mpm.masked_pretraining import MaskedPretraining
from mpm.objectives.masked import MaskedInputs


class Given(NamedTuple):
    """To this process, in all steps.

    Attributes:
        facts: what is told at the start.
        steps: numbers of the images of each micro-batch, and what is made of them.
    """

    facts: dict[str, str]
    steps: list[tuple[Tensor, MaskedInputs]]


def inputs_of(config: PretrainConfig, *, workers: int = 0) -> Given:
    """Without training; `workers` are the loader's."""
    config = config.model_copy(update={"run": config.run.model_copy(update={"workers": workers})})
    experiment = MaskedPretraining(config)
    parts = experiment.create(torch.device("cpu"), is_new=True)
    batches = build.training_loader(
        experiment.config,
        experiment.images,
        parts.view,
        start=0,
        stop=config.optim.steps,
        pin_memory=False,
        crops=parts.crops,
        cached=parts.codes,
    )
    return Given(parts.facts, [(batch.index, parts.prepare(batch)) for batch in batches])


def codes_in(given: Given) -> Tensor:
    """Those that are predicted, one after the other, int64 [n]."""
    return torch.cat([inputs.targets.flatten() for _, inputs in given.steps])
