"""From a configuration to objects: one `match` per choice, no registry.

Everything here calls the constructors that users call.
"""

from mpm.build.data import (
    mask_sampler,
    pretrain_view,
    source,
    statistics,
    tokenizer_view,
    train_view,
    training_loader,
)
from mpm.build.labelled import classifier, fit_timm, prepare_labelled, readout, supervised, timm_classifier
from mpm.build.masked import backbone, code_target, objective, predictor, target
from mpm.build.tokenizers import default_codes, tokenizer, tokenizer_objective
from mpm.build.training import Schedule, accumulation, dtype, facts, optimizer, parameters

__all__ = [
    "Schedule",
    "accumulation",
    "backbone",
    "classifier",
    "code_target",
    "default_codes",
    "dtype",
    "facts",
    "fit_timm",
    "mask_sampler",
    "objective",
    "optimizer",
    "parameters",
    "predictor",
    "prepare_labelled",
    "pretrain_view",
    "readout",
    "source",
    "statistics",
    "supervised",
    "target",
    "timm_classifier",
    "tokenizer",
    "tokenizer_objective",
    "tokenizer_view",
    "train_view",
    "training_loader",
]
