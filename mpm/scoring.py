"""What a classifier in training knows of images that it is not trained on."""

import json
import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mpm import distributed, partial
from mpm.config import FinetuneConfig
from mpm.data.datasets import ImageSource
from mpm.data.loading import BatchLoader, eval_loader
from mpm.data.views import EvalView
from mpm.evaluation.accuracy import SCORES, Accuracy, confusion_picture, evaluate
from mpm.heads import Heads, compare_heads
from mpm.labelled import LabelledData
from mpm.objectives.distillation import Distillation
from mpm.objectives.supervised import Classification
from mpm.patchify.pixels import Normalize, to_unit
from mpm.run import Run, write_picture

__all__ = ["Scoring"]

log = logging.getLogger(__name__)

_BATCH = 256

Objective = Classification | Distillation


class Scoring(NamedTuple):
    """Scores of a run's weights, all processes together.

    Attributes:
        config: of the run.
        normalize: of its images, on the device.
        device: of its weights.
    """

    config: FinetuneConfig
    normalize: Normalize
    device: torch.device

    def accuracies(self, objective: Objective, ema: Any, images: ImageSource) -> dict[str, Accuracy]:
        """Of the trained weights, `model`, and, where there is one, of their average, `ema`, in float32."""
        loader = self._loader(images)
        candidates = {"model": objective} | ({"ema": ema.module} if ema is not None else {})
        accuracies = {}
        for name, candidate in candidates.items():
            was_training = candidate.training
            candidate.eval()
            distributed.broadcast_buffers(candidate)  # batch norms of timm are of a process

            def predict(batch: Tensor, network: Any = candidate.classifier) -> Tensor:
                scores: Tensor = network.predict(self.normalize(to_unit(batch, self.device)))
                return scores

            with torch.no_grad():
                accuracies[name] = evaluate(
                    predict, loader, num_classes=len(images.classes or ()), device=self.device
                )
            candidate.train(was_training)
        return accuracies

    def heads(self, objective: Objective, images: ImageSource) -> Heads | None:
        """What the class head and the distillation head know; None: there is one head."""
        return compare_heads(objective.classifier, self._loader(images), self.normalize)

    def test(self, run: Run, objective: Objective, ema: Any, data: LabelledData) -> None:
        """Look at the test images once, with the checkpoint that validation chose (else with the last).

        The run's folder gets `confusion.png`, then `result.json`.
        """
        assert data.test is not None
        chosen = partial.load(run.folder)
        objective.load_state_dict(chosen.model)
        if ema is not None and chosen.ema is not None:
            ema.module.load_state_dict(chosen.ema)
        accuracies = self.accuracies(objective, ema, data.test)
        weights = chosen.metadata["weights"]
        heads = self.heads(ema.module if weights == "ema" else objective, data.test)
        if not distributed.is_main():
            return
        accuracy = accuracies[weights]
        result = {
            "test": {name: getattr(accuracy, name) for name in SCORES},
            "top1_of_weights": {name: of.top1 for name, of in accuracies.items()},
            **({} if heads is None else {"heads": heads._asdict()}),
            "weights": weights,
            "step": chosen.step,
            "seed": self.config.seed,
            "train_images": len(data.train),
            "init": self.config.init.checkpoint if self.config.init else None,
        }
        write_picture(run.folder / "confusion.png", confusion_picture(accuracy.confusion, data.classes))
        new = run.folder / "result.json.partial"
        new.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        new.replace(run.folder / "result.json")  # last: it says that the test was done
        log.info(
            "test images, step %d, %s weights: top-1 %.2f %%, top-5 %.2f %% of %d\n%s",
            chosen.step,
            weights,
            100 * accuracy.top1,
            100 * accuracy.top5,
            accuracy.count,
            accuracy.table(data.classes),
        )

    def _loader(self, images: ImageSource) -> BatchLoader:
        data = self.config.data
        assert data.image_size is not None
        view = EvalView(data.image_size, crop=data.test_crop, interpolation=data.interpolation)
        return eval_loader(images, view, batch_size=_BATCH, workers=self.config.run.workers)
