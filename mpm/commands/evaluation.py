"""`mpm evaluate`: what fine-tuned networks get right on labelled images, side by side."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mpm import build, distributed
from mpm.commands.scores import Scores, Speed, as_json, as_table, as_text
from mpm.config import FinetuneConfig, ImportedConfig
from mpm.data.channels import to_unit_range
from mpm.data.datasets import ImageSource
from mpm.data.loading import eval_loader
from mpm.data.views import EvalView
from mpm.evaluation.accuracy import confusion_picture, summarize
from mpm.evaluation.classes import are_numbers, match_classes
from mpm.evaluation.mistakes import Mistake, mistakes_picture, worst_mistakes
from mpm.evaluation.predictions import Predictions, predict_all
from mpm.evaluation.real import RealAccuracy, places_in_validation, read_real_labels, real_accuracy
from mpm.evaluation.throughput import images_per_second
from mpm.network import Network, load
from mpm.objectives.pictures import displayable
from mpm.run import started, write_picture

__all__ = ["evaluate"]

log = logging.getLogger(__name__)

_BATCH = 256
_TIMED_BATCH = {"cpu": 32, "cuda": 256}


def evaluate(
    checkpoints: Sequence[tuple[Path, FinetuneConfig | ImportedConfig]],
    *,
    image_sizes: Sequence[tuple[int, int]] | None = None,
    crops: Sequence[float] | None = None,
    real: Path | None = None,
    picture: Path | None = None,
    mistakes: Path | None = None,
    json: bool = False,
) -> str:
    """Scores on `data.test`, as text or JSON; every process of a torchrun calls it.

    Args:
        checkpoints: of fine-tuning, each with its configuration, which may name other test images. Classes
            that are named otherwise than a network's: see `match_classes`.
        image_sizes: height and width in pixels; None: that of training.
        crops: shares of the resized image's side; None: that of the configuration.
        real: file of ReaL labels, of ImageNet's validation images.
        picture: gets the confusion matrix as PNG; of one combination.
        mistakes: gets the worst mistakes as PNG; of one combination.
        json: for machines.

    Raises:
        ValueError: if the images have other classes than a network, or one cannot be read.
    """
    rows: list[Scores] = []
    sizes: Sequence[tuple[int, int] | None] = image_sizes or [None]
    sources: dict[
        int, ImageSource
    ] = {}  # by channels; generated images keep their size, whatever a network's
    with started(checkpoints[0][1]) as device:
        for path, config in checkpoints:
            for image_size in sizes:
                network = load(path, image_size=image_size, device=device)
                if network.channels not in sources:
                    sources[network.channels] = _source(config, network)
                source = sources[network.channels]
                matching = match_classes(
                    source.classes or (), network.classes, is_foreign=isinstance(config, ImportedConfig)
                )
                speed = _speed(network, device)
                for crop in crops or [config.data.test_crop]:
                    view = EvalView(network.image_size, crop=crop, interpolation=config.data.interpolation)
                    loader = eval_loader(source, view, batch_size=_BATCH, workers=config.run.workers)
                    found = predict_all(
                        network.logits, loader, num_classes=len(network.classes), device=device
                    )
                    found = found._replace(labels=torch.tensor(matching.number)[found.labels])
                    scores = Scores(
                        checkpoint=str(path),
                        image_size=network.image_size,
                        crop=crop,
                        accuracy=summarize(found, num_classes=len(network.classes)),
                        real=None if real is None else _real(real, found, source, network),
                        classes=matching.names,
                        matched=matching.told,
                        left_out=sum(distributed.gather_objects(len(loader.broken))),
                        parameters=sum(parameter.numel() for parameter in network.parameters()),
                        speed=speed,
                    )
                    rows.append(scores)
        wrong = worst_mistakes(found, scores.classes)
        if picture is not None:
            write_picture(picture, confusion_picture(scores.accuracy.confusion, scores.classes))
            log.info("wrote %s: confusion matrix of %d images", picture, scores.accuracy.count)
        if mistakes is not None:
            _draw_mistakes(mistakes, wrong, source, view, images=scores.accuracy.count)
    for matched in dict.fromkeys(row.matched for row in rows if row.matched):
        log.info(matched)
    if json:
        return as_json(rows, [(source.name(mistake.place), mistake) for mistake in wrong])
    return as_text(scores) if len(rows) == 1 else as_table(rows)


def _source(config: FinetuneConfig | ImportedConfig, network: Network) -> ImageSource:
    assert config.data.test is not None
    return build.source(
        config.data.test,
        image_size=network.image_size,
        channels=network.channels,
        labelled=True,
        key="data.test",
    )


def _speed(network: Network, device: torch.device) -> Speed:
    """On the main process, while the others wait."""
    batch = _TIMED_BATCH[device.type]
    measured = 0.0
    if distributed.is_main():
        shape = (batch, network.channels, *network.image_size)
        images = torch.randint(256, shape, dtype=torch.uint8, device=device)
        measured = images_per_second(network.logits, images)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return Speed(distributed.broadcast_object(measured), batch, name, torch.get_num_threads())


def _real(file: Path, found: Predictions, source: ImageSource, network: Network) -> RealAccuracy:
    """The file's numbers are of ImageNet's classes; a network may have these in another order."""
    classes = network.classes
    labels = read_real_labels(file, num_classes=len(classes))
    if are_numbers(classes):
        labels = [[classes.index(str(number)) for number in each] for each in labels]
    names = (source.name(place) for place in range(len(source)))
    return real_accuracy(found, labels, places_in_validation(names, len(labels)))


def _draw_mistakes(
    file: Path, mistakes: Sequence[Mistake], source: ImageSource, view: EvalView, *, images: int
) -> None:
    if not mistakes:
        log.info("no mistakes; %s is not written", file)
    elif distributed.is_main():

        def image_of(place: int) -> Tensor:
            return displayable(to_unit_range(view(source.read(place)))[None])[0]

        write_picture(file, mistakes_picture(mistakes, source.name, image_of, images=images))
        log.info("wrote %s: the surest of %d mistakes", file, len(mistakes))
