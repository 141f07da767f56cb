"""What is watched while pretraining: reconstructions, signs of collapse, and k-NN where there are labels."""

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mpm import build, distributed
from mpm.config import PretrainConfig, Source, TokenizerConfig
from mpm.data.datasets import ImageSource
from mpm.data.loading import eval_loader, stack
from mpm.data.subsets import Subset
from mpm.data.substitution import Substituting
from mpm.data.views import EvalView
from mpm.evaluation.features import Features, extract, feature_std, rank_me
from mpm.evaluation.knn import knn_accuracy
from mpm.experiment import Look
from mpm.objectives.latent import LatentPrediction
from mpm.objectives.masked import MaskedPrediction
from mpm.objectives.pictures import displayable, reconstructions, sheet
from mpm.objectives.targets import Target
from mpm.patchify.masks import PatchMask
from mpm.patchify.patches import grid_of
from mpm.patchify.pixels import Normalize, to_unit
from mpm.tokenizers.base import Tokenizer
from mpm.tokenizers.use import CodeUse, code_use

__all__ = ["CodeMonitor", "Monitor", "code_views"]

log = logging.getLogger(__name__)

_UNLABELLED_IMAGES = 2048
_BATCH = 256
_IMAGES_FOR_CODES = 1024  # of which published tokenizers cost teraflops
_CODE_BATCH = 32  # a layer of DALL-E's encoder holds 13 MB for an image


def looked_at(count: int, rng: np.random.Generator) -> np.ndarray:
    """A few of `count` images, in random order: folders come class by class."""
    return rng.permutation(count)[:_UNLABELLED_IMAGES]


def code_views(
    images: Substituting, view: EvalView, *, seed: int, workers: int, device: torch.device
) -> Iterator[Tensor]:
    """Some images as a tokenizer gets them, float32 [B,C,H,W] in [0,1]; each process has its share."""
    some = Subset(images, np.random.default_rng(seed).permutation(len(images))[:_IMAGES_FOR_CODES])
    for batch in eval_loader(some, view, batch_size=_CODE_BATCH, workers=workers):
        yield to_unit(batch.images, device)


class Monitor:
    """Looks at an objective with images that it is not trained on, or, without any, at the training images.

    Args:
        config: of the run.
        images: the training images.
        target: what is predicted, to draw it; None: it has no picture.
        normalize: for the network.
        device: of the network.
    """

    def __init__(
        self,
        config: PretrainConfig,
        images: ImageSource,
        *,
        target: Target | None,
        normalize: Normalize,
        device: torch.device,
    ):
        self._config = config
        self._target = target
        self._normalize = normalize
        self._device = device
        self._view = EvalView(config.data.image_size, crop=1.0, interpolation=config.data.interpolation)
        self._bank = self._labelled(config.monitor.train)
        self._queries = self._labelled(config.monitor.test)
        shown = self._queries or Substituting(images)
        rng = np.random.default_rng(config.seed)
        self._some = looked_at(len(shown), rng)
        self._shown = shown if self._queries is not None else Subset(shown, self._some)
        count = min(config.monitor.images, len(shown))
        places = self._some[:count]
        self._images = (
            torch.stack([self._view(shown.read(int(place))) for place in places]) if count else None
        )
        sampler = build.mask_sampler(config)
        self._masked = torch.from_numpy(np.stack([sampler(rng) for _ in range(max(count, 1))]))

    @torch.no_grad()
    def look(self, objective: MaskedPrediction | LatentPrediction) -> Look:
        """Signals by name, and reconstructions; every process calls it.

        RankMe (the effective rank of the features) and their deviation fall where features collapse; k-NN
        needs labels.
        """
        was_training = objective.training
        objective.eval()
        try:
            return Look(self._signals(objective), self._picture(objective))
        finally:
            objective.train(was_training)

    def _signals(self, objective: MaskedPrediction | LatentPrediction) -> dict[str, float]:
        queries = self._features(objective, self._shown)
        some = queries.features if self._queries is None else queries.features[self._some]
        signals = {"rank_me": rank_me(some), "feature_std": feature_std(some)}
        if self._bank is not None and self._bank.classes is not None:
            bank = self._features(objective, self._bank)
            signals["knn_top1"] = knn_accuracy(
                queries.features,
                queries.labels,
                bank.features,
                bank.labels,
                k=self._config.monitor.k,
                num_classes=len(self._bank.classes),
            )
        return signals

    def _features(self, objective: MaskedPrediction | LatentPrediction, images: ImageSource) -> Features:
        def encode(batch: Tensor) -> Tensor:
            encoded = objective.backbone(self._normalize(to_unit(batch, self._device)))
            return objective.predictor.norm(encoded.patches).mean(1)

        workers = self._config.run.workers
        return extract(encode, eval_loader(images, self._view, batch_size=_BATCH, workers=workers))

    def _picture(self, objective: MaskedPrediction | LatentPrediction) -> Tensor | None:
        if self._images is None or self._target is None or not distributed.is_main():
            return None
        mask = PatchMask.from_bool(self._masked.to(self._device), self._config.num_masked)
        images = to_unit(self._images, self._device)
        assert isinstance(objective, MaskedPrediction)
        return reconstructions(objective, self._target, images, mask, normalize=self._normalize)

    def _labelled(self, source: Source | None) -> ImageSource | None:
        if source is None:
            return None
        data = self._config.data
        images = build.source(source, image_size=data.image_size, channels=data.channels, labelled=True)
        return Substituting(images)


class CodeMonitor:
    """Looks at a tokenizer that is being trained: how its codes are used, and what they keep of images.

    Args:
        config: of the run, resolved.
        images: the training images.
        device: of the tokenizer.
    """

    def __init__(self, config: TokenizerConfig, images: ImageSource, *, device: torch.device):
        data = config.data
        self._device = device
        self._workers = config.run.workers
        self._view = EvalView(data.image_size, crop=1.0, interpolation=data.interpolation)
        shown = images
        if config.monitor.test is not None:
            test = config.monitor.test
            shown = build.source(test, image_size=data.image_size, channels=data.channels, labelled=False)
        self._shown = Substituting(shown)
        self._seed = config.seed
        self._some = looked_at(len(shown), np.random.default_rng(config.seed))
        self._images = config.monitor.images

    @torch.no_grad()
    def look(self, objective: nn.Module) -> Look:
        """Use of the codes, and originals above what their codes say; every process calls it."""
        tokenizer: Any = objective.get_submodule("tokenizer")
        was_training = tokenizer.training
        tokenizer.eval()
        try:
            views = code_views(
                self._shown, self._view, seed=self._seed, workers=self._workers, device=self._device
            )
            use = code_use(tokenizer, views)
            log.info("codes: %s", use)
            signals = {
                "perplexity": use.perplexity,
                "live_codes": use.live_share,
                "frequent_code": use.frequent_share,
            }
            return Look(signals, self._picture(tokenizer, use), use.counts)
        finally:
            tokenizer.train(was_training)

    def _picture(self, tokenizer: Tokenizer, use: CodeUse) -> Tensor | None:
        count = min(self._images, len(self._some))
        if not count or not distributed.is_main():
            return None
        views = [self._view(self._shown.read(int(place))) for place in self._some[:count]]
        images = to_unit(stack(views), self._device)
        grid = grid_of((images.shape[2], images.shape[3]), tokenizer.stride)
        codes = tokenizer.encode(images)
        drawn = tokenizer.decode(codes, grid)
        rows = [images] if drawn is None else [images, drawn]
        return sheet(torch.stack([displayable(row) for row in [*rows, use.draw(codes, grid)]]))
