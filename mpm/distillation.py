"""What fine-tuning learns from besides labels: a configuration's teacher, read, checked and frozen."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mpm import build
from mpm.backbones.classifier import Classifier
from mpm.backbones.timm_classifier import TimmClassifier
from mpm.config import CheckpointTeacher, FinetuneConfig, TimmTeacher
from mpm.config.section import check_multiple
from mpm.data.answers import open_answer_cache
from mpm.data.datasets import ImageSource
from mpm.data.rows import RowCache
from mpm.data.substitution import images_digest
from mpm.interop.timm_hub import create_timm
from mpm.network import load
from mpm.objectives.teachers import ClassTeacher, published_normalize
from mpm.patchify.pixels import Normalize
from mpm.tokenization import digest
from mpm.trunk import holds_timm, present, read_trunk

__all__ = ["ReadTeacher", "answer_fingerprint", "open_answers", "read_teacher"]

log = logging.getLogger(__name__)

_KEY = "distillation.teacher"


class ReadTeacher(NamedTuple):
    """A teacher, on the CPU.

    Attributes:
        teacher: images in [0,1] to logits.
        identity: digest of its weights as they were read: resampling them rounds by the machine.
        told: what the log says of it.
        key: the configuration's, that names it.
    """

    teacher: ClassTeacher
    identity: str
    told: str
    key: str


class _Network(NamedTuple):
    """A classifier as it was read, for images of the wanted size."""

    classifier: Classifier | TimmClassifier
    identity: str
    normalize: Normalize
    interpolation: str
    classes: tuple[str, ...]  # none where they have no names
    num_classes: int


def read_teacher(config: FinetuneConfig, classes: Sequence[str]) -> ReadTeacher | None:
    """The teacher of a resolved configuration; None: it has none.

    Args:
        config: with the student's image size and channels.
        classes: of the data.

    Raises:
        ValueError: if the teacher cannot be had, or its classes, channels or image size do not fit.
        FileNotFoundError: if it is not there.
    """
    if config.distillation is None:
        return None
    stated, data = config.distillation.teacher, config.data
    assert data.image_size is not None and data.channels is not None
    size = stated.image_size or data.image_size
    match stated:
        case TimmTeacher():
            name = f"{_KEY}.model {stated.model}"
            read = _of_timm(stated, size, name=name, num_classes=len(classes), seed=config.seed)
        case CheckpointTeacher(checkpoint=source):
            name = f"{_KEY}.checkpoint {source}"
            read = _of_checkpoint(source, size, name=name)
    _check_classes(read, classes, name=name)
    channels = len(read.normalize.mean)
    if data.channels not in (1, channels):
        grey = "" if channels == 1 else ", or 1: grey images are repeated"
        raise ValueError(
            f"{name} takes {channels} channel(s), and data.channels is {data.channels}; "
            f"set data.channels={channels}{grey}"
        )
    teacher = ClassTeacher(
        read.classifier,
        normalize=read.normalize,
        image_size=stated.image_size,
        interpolation=read.interpolation,
        dtype=build.dtype(config.optim),
    )
    key, _, value = name.partition(" ")
    return ReadTeacher(teacher, read.identity, f"{value}, {size[0]}x{size[1]} px", key)


def open_answers(config: FinetuneConfig, taught: ReadTeacher | None, images: ImageSource) -> RowCache | None:
    """The cached answers to all crops of the images; None: the teacher is asked in each step.

    Raises:
        FileNotFoundError: if there is no file.
        ValueError: if the answers are to something else, or incomplete.
    """
    if taught is None or config.distillation is None or config.distillation.cache is None:
        return None
    fingerprint = answer_fingerprint(config, taught, images)
    return open_answer_cache(config.distillation.cache, fingerprint=fingerprint)


def answer_fingerprint(config: FinetuneConfig, taught: ReadTeacher, images: ImageSource) -> dict[str, Any]:
    """All that the answers to the crops depend on, as plain data."""
    assert config.distillation is not None
    not_seen = {"train", "val", "test", "std", "erasing", "test_crop", "repeats"}
    if config.data.rand_augment is None:  # which fills what it uncovers
        not_seen.add("mean")
    teacher = taught.teacher
    return {
        "seed": config.seed,  # first, as other held-out images follow from another
        "images": {
            "sha256": images_digest(images),
            "of": str(getattr(config.data.train, "root", config.data.train.kind)),
        },
        "teacher": {"sha256": taught.identity, "of": taught.told},
        "teacher's image_size": teacher.image_size,
        "dtype": str(teacher.dtype),
        "crops": config.distillation.crops,
        "data": config.data.model_dump(mode="json", exclude=not_seen),
    }


def _of_timm(
    stated: TimmTeacher, size: tuple[int, int], *, name: str, num_classes: int, seed: int
) -> _Network:
    """Published, local or random weights, in this order."""
    arguments: dict[str, Any] = {}
    if stated.random or stated.weights is not None:
        arguments["num_classes"] = num_classes
    if stated.weights is not None:
        if not stated.weights.is_file():
            raise FileNotFoundError(f"{_KEY}.weights: there is no file {stated.weights}")
        # as many classes as the model's, or timm would leave out the head of the file
        overlay = {"file": str(stated.weights), "num_classes": num_classes}
        arguments["pretrained_cfg_overlay"] = overlay
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = create_timm(stated.model, pretrained=not stated.random, **arguments)
    identity = digest(network)
    build.fit_timm(network, size, name=name, key=f"{_KEY}.image_size")
    if stated.random:
        log.warning("%s has random weights, as was asked for: what it teaches means nothing", name)
    return _Network(
        TimmClassifier(network),
        identity,
        published_normalize(network),
        network.pretrained_cfg["interpolation"],
        (),
        network.num_classes,
    )


def _of_checkpoint(source: str, size: tuple[int, int], *, name: str) -> _Network:
    """The better of a run's weights, the averaged or the trained."""
    if holds_timm(present(source, key=f"{_KEY}.checkpoint")):
        whole = load(Path(source).expanduser())
        assert whole.classifier is not None
        classes, identity = whole.classes, digest(whole.classifier)
        build.fit_timm(whole.classifier.backbone, size, name=name, key=f"{_KEY}.image_size")
        return _Network(
            whole.classifier,
            identity,
            whole.normalize,
            whole.view.interpolation,
            classes,
            len(classes),
        )
    trunk = read_trunk(source)
    for side, patch in zip(size, trunk.backbone.resolved().patch_size, strict=True):
        check_multiple(f"{_KEY}.image_size", side, patch, of=f"the teacher's patch_size {patch}")
    own = trunk.classifier_at(trunk.image_size)
    return _Network(
        own if size == trunk.image_size else trunk.classifier_at(size),
        digest(own),
        Normalize(trunk.mean, trunk.std),
        trunk.interpolation,
        trunk.classes if trunk.step else (),  # others name their classes as they like
        trunk.num_classes,
    )


def _check_classes(read: _Network, classes: Sequence[str], *, name: str) -> None:
    """By number; by name, too, where the teacher has names.

    Raises:
        ValueError: if they differ.
    """
    if read.num_classes != len(classes):
        raise ValueError(
            f"{name} knows {read.num_classes} classes, and the data has {len(classes)}; give a teacher of "
            "these classes, such as one that finetune.py has trained on them: "
            f"{_KEY}={{kind: checkpoint, checkpoint: FOLDER}}"
        )
    theirs = read.classes
    if theirs and theirs != tuple(classes):
        differing = next((a, b) for a, b in zip(theirs, classes, strict=True) if a != b)
        raise ValueError(
            f"{name} has other classes than the data, or in another order: {differing[0]} where the data has "
            f"{differing[1]}; give a teacher of these classes"
        )
