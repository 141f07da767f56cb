"""What is watched while pretraining: reconstructions, signs of collapse, and k-NN where there are labels."""

import logging

import numpy as np
import torch
from torch import Tensor

from mpm import build, distributed
from mpm.config import PretrainConfig, Source
from mpm.data.datasets import ImageSource
from mpm.data.loading import eval_loader
from mpm.data.subsets import Subset
from mpm.data.substitution import Substituting
from mpm.data.views import EvalView
from mpm.evaluation.features import Features, extract, feature_std, rank_me
from mpm.evaluation.knn import knn_accuracy
from mpm.objectives.masked import MaskedPrediction
from mpm.objectives.pictures import reconstructions
from mpm.objectives.targets import Target
from mpm.patchify.masks import PatchMask
from mpm.patchify.pixels import Normalize, to_unit

__all__ = ["Monitor"]

log = logging.getLogger(__name__)

_UNLABELLED_IMAGES = 2048
_BATCH = 256


class Monitor:
    """Looks at an objective with images that it is not trained on, or, without any, at the training images.

    Args:
        config: of the run.
        images: the training images.
        target: what is predicted.
        normalize: for the network.
        device: of the network.
    """

    def __init__(
        self,
        config: PretrainConfig,
        images: ImageSource,
        *,
        target: Target,
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
        # a few of all, in random order: folders come class by class
        self._some = rng.permutation(len(shown))[:_UNLABELLED_IMAGES]
        self._shown = shown if self._queries is not None else Subset(shown, self._some)
        count = min(config.monitor.images, len(shown))
        places = self._some[:count]
        self._images = (
            torch.stack([self._view(shown.read(int(place))) for place in places]) if count else None
        )
        sampler = build.mask_sampler(config)
        self._masked = torch.from_numpy(np.stack([sampler(rng) for _ in range(max(count, 1))]))

    @torch.no_grad()
    def look(self, objective: MaskedPrediction) -> tuple[dict[str, float], Tensor | None]:
        """Signals by name, and reconstructions uint8 [3,H,W]; every process calls it.

        RankMe (the effective rank of the features) and their deviation fall where features collapse; k-NN
        needs labels.
        """
        was_training = objective.training
        objective.eval()
        try:
            return self._signals(objective), self._picture(objective)
        finally:
            objective.train(was_training)

    def _signals(self, objective: MaskedPrediction) -> dict[str, float]:
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

    def _features(self, objective: MaskedPrediction, images: ImageSource) -> Features:
        def encode(batch: Tensor) -> Tensor:
            encoded = objective.backbone(self._normalize(to_unit(batch, self._device)))
            return objective.predictor.norm(encoded.patches).mean(1)

        workers = self._config.run.workers
        return extract(encode, eval_loader(images, self._view, batch_size=_BATCH, workers=workers))

    def _picture(self, objective: MaskedPrediction) -> Tensor | None:
        if self._images is None or not distributed.is_main():
            return None
        mask = PatchMask.from_bool(self._masked.to(self._device), self._config.num_masked)
        images = to_unit(self._images, self._device)
        return reconstructions(objective, self._target, images, mask, normalize=self._normalize)

    def _labelled(self, source: Source | None) -> ImageSource | None:
        if source is None:
            return None
        data = self._config.data
        images = build.source(source, image_size=data.image_size, channels=data.channels, labelled=True)
        return Substituting(images)
