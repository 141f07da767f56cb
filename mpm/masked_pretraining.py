"""Masked prediction as an experiment: what a configuration of pretraining becomes."""

import logging
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from mpm import build, distributed
from mpm.config import CodeTarget, LatentTarget, PretrainConfig, PretrainData, Statistics
from mpm.data.codes import open_code_cache
from mpm.data.datasets import ImageSource
from mpm.data.loading import stack
from mpm.data.substitution import Substituting, images_digest
from mpm.data.views import EvalView
from mpm.experiment import Parts
from mpm.monitoring import Monitor, code_views
from mpm.objectives.cost import masked_macs
from mpm.objectives.latent import LatentPrediction
from mpm.objectives.masked import MaskedPrediction
from mpm.objectives.prepare import PrepareMasked
from mpm.objectives.targets import CodeTarget as Codes
from mpm.objectives.targets import Target
from mpm.patchify.pixels import Normalize, to_unit
from mpm.tokenization import digest, read_tokenizer
from mpm.tokenizers.base import Tokenizer
from mpm.tokenizers.use import CodeUse, code_use
from mpm.trunk import Trunk, read_start

__all__ = ["MaskedPretraining", "code_fingerprint", "code_target"]

log = logging.getLogger(__name__)

_IMAGES_COMPARED = 32
_AGREEMENT = 0.99  # of codes in bf16 with those in fp32


class MaskedPretraining:
    """Reads what the configuration names, and states all of it.

    Attributes:
        kind: "pretrain".
        config: resolved.
        images: the training images.
        identity: of the tokenizer, and the precision it computes in.

    Raises:
        ValueError: if what it names does not fit.
        FileNotFoundError: if it is not there.
    """

    kind = "pretrain"

    def __init__(self, config: PretrainConfig):
        data = config.data
        self._trunk = read_start(config.init)
        backbone = config.backbone if self._trunk is None else config.backbone.over(self._trunk.backbone)
        images = build.source(data, image_size=data.image_size, channels=data.channels, labelled=False)
        mean, std = build.statistics(*_moments(data, self._trunk), images)
        self.images = images
        self.config = config.model_copy(
            update={
                "backbone": backbone.in_full(classifier=False),
                "objective": config.objective.in_full(),
                "data": data.model_copy(update={"mean": mean, "std": std}),
            }
        )
        target = config.objective.target
        self._tokenizer = read_tokenizer(target.tokenizer) if isinstance(target, CodeTarget) else None
        self.identity: dict[str, str] = {}
        if self._tokenizer is not None:
            self.identity["objective.target.tokenizer"] = digest(cast(nn.Module, self._tokenizer))
            build.tokenizer_view(self.config, self._tokenizer)  # whether it fits

    def create(self, device: torch.device, *, is_new: bool) -> Parts:
        """See `Experiment`."""
        config, data = self.config, self.config.data
        assert isinstance(data.mean, tuple) and isinstance(data.std, tuple)
        normalize = Normalize(data.mean, data.std).to(device)
        facts: dict[str, str] = {}
        target: Target | None = None
        if isinstance(config.objective.target, LatentTarget):
            pass  # the objective makes its own
        elif self._tokenizer is None:
            target = build.target(config, normalize)
        else:
            target, facts = code_target(config, self._tokenizer, Substituting(self.images), device=device)
            self.identity["precision of codes"] = str(target.dtype)
        objective = build.objective(config, None if target is None else target.out_dim).to(device)
        if self._trunk is not None and is_new:
            _continue_from(self._trunk, objective, channels=data.channels)
            if isinstance(objective, LatentPrediction):
                objective.reset_teacher()
        monitor = Monitor(config, self.images, target=target, normalize=normalize, device=device)
        macs = masked_macs(objective, num_masked=config.num_masked)
        crops, cache = None, None
        if isinstance(config.objective.target, CodeTarget):
            crops = config.objective.target.crops
            if crops is not None:
                facts["crops"] = f"the same {crops} of each image in turn"
            if (file := config.objective.target.cache) is not None:
                fingerprint = code_fingerprint(config, cast(Codes, target), self.images)
                cache = open_code_cache(file, fingerprint=fingerprint)
                facts["crops"] += f", their codes read from {file}"
        return Parts(
            objective=objective,
            prepare=PrepareMasked(target, normalize=normalize, num_masked=config.num_masked, device=device),
            view=build.pretrain_view(config, self._tokenizer),
            look=lambda: monitor.look(objective),
            macs=macs,
            facts={
                "parameters": build.parameters(objective),
                "forward": f"{macs / 1e9:.3g} GMACs an image",
                "masked": f"{config.num_masked} of {config.num_patches} patches",
                **facts,
            },
            crops=crops,
            codes=cache,
        )


def code_target(
    config: PretrainConfig, tokenizer: Tokenizer, images: Substituting, *, device: torch.device
) -> tuple[Codes, dict[str, str]]:
    """The target of a tokenizer whose codes are in use, and what is told about it.

    Raises:
        ValueError: if fewer codes are live than `min_live`.
    """
    stated = config.objective.target
    assert isinstance(stated, CodeTarget)
    assert isinstance(tokenizer, nn.Module)
    tokenizer.to(device)
    size = build.tokenizer_view(config, tokenizer)
    view = EvalView(size, crop=1.0, interpolation=tokenizer.interpolation)
    views = code_views(images, view, seed=config.seed, workers=config.run.workers, device=device)
    use = code_use(tokenizer, views)
    if use.live_share < stated.min_live:
        raise ValueError(
            f"the codebook of {stated.tokenizer} has collapsed: {use}; that is {use.live_share:.1%} of what "
            f"could occur, below objective.target.min_live {stated.min_live:g}. Train another tokenizer, or "
            "lower min_live to go on with this one"
        )
    dtype, agreement = torch.float32, ""
    if stated.dtype == "bf16" or (stated.dtype == "auto" and config.optim.dtype == "bf16"):
        # the same images on every process, however many there are
        places = np.random.default_rng(config.seed).permutation(len(images))[:_IMAGES_COMPARED]
        few = [view(images.read(int(place))) for place in places]
        share = _agreement(config, tokenizer, to_unit(stack(few), device), use)
        share = distributed.broadcast_object(share)
        agreement = f"; {share:.2%} of the codes in bf16 are those in fp32"
        if stated.dtype == "bf16" or share >= _AGREEMENT:
            dtype = torch.bfloat16
    target = build.code_target(config, tokenizer, use, dtype=dtype)
    kept = "bf16" if dtype == torch.bfloat16 else "fp32"
    return target, {
        "codes": str(use),
        "tokenizer": f"{stated.tokenizer}, {size[0]}x{size[1]} px, {kept}{agreement}",
    }


def code_fingerprint(config: PretrainConfig, target: Codes, images: ImageSource) -> dict[str, Any]:
    """All that the codes of the crops depend on, as plain data."""
    assert isinstance(config.objective.target, CodeTarget)
    view = config.data.model_dump(
        mode="json", exclude={"mean", "std", "interpolation", "root", "index", "download"}
    )
    stated = config.objective.target
    return {
        "images": {
            "sha256": images_digest(images),
            "of": str(getattr(config.data, "root", config.data.kind)),
        },
        "tokenizer": {"sha256": digest(cast(nn.Module, target.tokenizer)), "of": stated.tokenizer},
        "dtype": str(target.dtype),
        "seed": config.seed,
        "crops": stated.crops,
        "grid": list(config.grid),
        "data": {
            **view,
            "view": list(build.tokenizer_view(config, target.tokenizer)),
            "interpolation": target.tokenizer.interpolation,
        },
    }


def _agreement(config: PretrainConfig, tokenizer: Tokenizer, images: Tensor, use: CodeUse) -> float:
    """Share of the codes that are the same in bfloat16 and float32."""
    in_bf16, in_fp32 = (
        build.code_target(config, tokenizer, use, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)
    )
    with torch.no_grad():
        return float((in_bf16.codes(images) == in_fp32.codes(images)).float().mean())


def _moments(data: PretrainData, trunk: Trunk | None) -> tuple[Statistics, Statistics]:
    """Means and deviations as stated, else the checkpoint's, else ImageNet's."""
    if data.mean is not None and data.std is not None:
        return data.mean, data.std
    if trunk is None:
        return data.mean or "imagenet", data.std or "imagenet"
    if trunk.channels != data.channels:
        raise ValueError(
            f"data.channels {data.channels} is not the checkpoint's {trunk.channels}; "
            f"give data.mean and data.std too: measured, or a list of {data.channels}"
        )
    return data.mean or trunk.mean, data.std or trunk.std


def _continue_from(trunk: Trunk, objective: MaskedPrediction | LatentPrediction, *, channels: int) -> None:
    """Load the backbone, and the predictor where it is the same; else the norm that read the trunk."""
    objective.backbone.load_state_dict(trunk.weights_for(objective.backbone, channels=channels))
    predictor = objective.get_submodule("predictor")
    # a fixed position table is of this run's grid, not a weight
    theirs = trunk.state["predictor"] | dict(predictor.named_buffers())
    own = predictor.state_dict()
    if {name: t.shape for name, t in own.items()} == {name: t.shape for name, t in theirs.items()}:
        predictor.load_state_dict(theirs)
        parts = "backbone and predictor"
    elif trunk.norm:
        predictor.get_submodule("norm").load_state_dict(trunk.norm)
        parts = "backbone and its norm; the predictor is another one and starts fresh"
    else:
        parts = "backbone; the predictor starts fresh"
    log.info("continuing from %s: %s", trunk.path, parts)
