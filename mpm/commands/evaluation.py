"""`mpm evaluate`: what a fine-tuned network gets right on labelled images."""

import json
import logging
from pathlib import Path

from mpm import build
from mpm.config import FinetuneConfig, ImportedConfig
from mpm.data.loading import eval_loader
from mpm.data.views import EvalView
from mpm.evaluation.accuracy import Accuracy, confusion_picture
from mpm.evaluation.accuracy import evaluate as accuracy_of
from mpm.network import load
from mpm.run import started, write_picture

__all__ = ["evaluate"]

log = logging.getLogger(__name__)

_BATCH = 256


def evaluate(
    checkpoint: Path,
    config: FinetuneConfig | ImportedConfig,
    *,
    picture: Path | None = None,
    as_json: bool = False,
) -> str:
    """Scores on `data.test`, as text or JSON; every process of a torchrun calls it.

    Args:
        checkpoint: of fine-tuning.
        config: the checkpoint's, with other test images where wanted. Classes of weights that others
            trained are matched by number, with the folders in the order of their names.
        picture: gets the confusion matrix as PNG.
        as_json: for machines.

    Raises:
        ValueError: if the images have other classes than the network, or one cannot be read.
    """
    assert config.data.test is not None
    with started(config) as device:
        network = load(checkpoint, device=device)
        images = build.source(
            config.data.test, image_size=network.image_size, channels=network.channels, labelled=True
        )
        classes = images.classes or ()
        # others name their classes as they like; by number, then, but not where some names are the same
        is_foreign = isinstance(config, ImportedConfig) and not set(classes) & set(network.classes)
        by_number = is_foreign and len(classes) == len(network.classes)
        if classes != network.classes and not by_number:
            raise ValueError(_difference(classes, network.classes))
        view = EvalView(
            network.image_size, crop=config.data.test_crop, interpolation=config.data.interpolation
        )
        loader = eval_loader(images, view, batch_size=_BATCH, workers=config.run.workers)
        scores = accuracy_of(network.predict, loader, num_classes=len(classes), device=device)
        if picture is not None:
            write_picture(picture, confusion_picture(scores.confusion, classes))
    if by_number:
        log.info("classes are matched by number: the folders in the order of their names")
    return _json(scores, classes) if as_json else _text(scores, classes)


def _difference(found: tuple[str, ...], known: tuple[str, ...]) -> str:
    if known == tuple(map(str, range(len(known)))):
        return (
            f"data.test has {len(found)} classes, the network {len(known)} without names; "
            f"give {len(known)} folders, whose names are in the order of the classes"
        )
    sides = {"unknown to the network": set(found) - set(known), "without images": set(known) - set(found)}
    listed = [f"{', '.join(sorted(names)[:3])} {side}" for side, names in sides.items() if names]
    return (
        f"data.test has {len(found)} classes, the network {len(known)} "
        f"({'; '.join(listed) or 'in another order'}); give a folder with exactly the network's classes"
    )


def _text(scores: Accuracy, classes: tuple[str, ...]) -> str:
    named = {
        "images": f"{scores.count:,}",
        "top-1": f"{scores.top1:.2%}",
        "top-5": f"{scores.top5:.2%}",
        "balanced accuracy": f"{scores.balanced:.2%}",
        "macro F1": f"{scores.macro_f1:.2%}",
    }
    width = max(map(len, named))
    lines = [f"{name:<{width}}  {value}" for name, value in named.items()]
    return "\n".join([*lines, "", scores.table(classes)])


def _json(scores: Accuracy, classes: tuple[str, ...]) -> str:
    per_class = {
        name: {
            "images": int(scores.confusion[number].sum()),
            "precision": float(scores.precision[number]),
            "recall": float(scores.recall[number]),
            "f1": float(scores.f1[number]),
        }
        for number, name in enumerate(classes)
    }
    overall = {name: getattr(scores, name) for name in ("count", "top1", "top5", "balanced", "macro_f1")}
    return json.dumps(overall | {"classes": per_class, "confusion": scores.confusion.tolist()})
