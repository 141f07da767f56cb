"""`mpm probe`: how well labels can be told from frozen features, layer by layer."""

import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mpm import build, distributed
from mpm.commands.probe_report import Draw, Row, Scored, Sizes, report
from mpm.commands.probe_tokens import KeptTokens, LabelledImages, RecomputedTokens, keep
from mpm.config import ProbeConfig
from mpm.data.datasets import ImageSource
from mpm.data.loading import eval_loader
from mpm.data.subsets import Subset, labelled_subset
from mpm.data.views import EvalView
from mpm.evaluation.attentive_probe import attentive_scores
from mpm.evaluation.classes import class_difference
from mpm.evaluation.features import Features
from mpm.evaluation.layer_features import LayerFeatures, extract_layers
from mpm.evaluation.probes import held_out_folds, knn_score, linear_score
from mpm.network import Network, load
from mpm.run import started

__all__ = ["feature_rows", "layer_features", "layer_tokens", "probe"]

log = logging.getLogger(__name__)

_BATCH = 256

TokenPair = tuple[KeptTokens | RecomputedTokens, KeptTokens | RecomputedTokens]


def probe(
    checkpoint: Path,
    config: ProbeConfig,
    *,
    draws: Sequence[Draw],
    attentive: bool = False,
    memory_gib: float = 4.0,
    as_json: bool = False,
) -> str:
    """Scores of every layer, as text or JSON; every process of a torchrun calls it.

    The network runs over the images once, on all processes; the main process then fits the probes.

    Args:
        checkpoint: of pretraining, of fine-tuning, or imported.
        config: its images.
        draws: of the training labels; each is scored.
        attentive: also the attentive probe, on one process.
        memory_gib: for its patch tokens; where they need more, the network runs again in each epoch.
        as_json: for machines.

    Returns: the report; "" on other processes than the main one.

    Raises:
        ValueError: if training and test images have different classes, too few can be read, or there are no
            patch tokens for the attentive probe.
    """
    with started(config) as device:
        if attentive and distributed.world_size() > 1:
            raise ValueError("the attentive probe learns on one process; start it without torchrun")
        network = load(checkpoint, device=device)
        if attentive and not network.depth:
            raise ValueError(
                f"{checkpoint} is a whole model of timm, which tells no patch tokens; leave --attentive out"
            )
        train, test = (
            build.source(source, image_size=network.image_size, channels=network.channels, labelled=True)
            for source in (config.data.train, config.data.test)
        )
        if train.classes != test.classes:
            difference = class_difference(
                test.classes or (), train.classes or (), name="data.test", other="data.train"
            )
            raise ValueError(f"{difference}; name the folders alike")
        chosen = [labelled_subset(train, count=d.number, fraction=d.fraction, seed=d.seed) for d in draws]
        used = np.unique(np.concatenate(chosen))  # what no draw holds is not encoded
        view = EvalView(
            network.image_size, crop=config.data.test_crop, interpolation=config.data.interpolation
        )
        workers = config.run.workers
        known = _features(network, train, used, view=view, workers=workers, device=device)
        everything = np.arange(len(test))
        asked = _features(network, test, everything, view=view, workers=workers, device=device)
        if not distributed.is_main():
            return ""
        tokens = None
        if attentive:
            pair = [
                LabelledImages(source, view, found.places, found.labels, workers)
                for source, found in ((train, known), (test, asked))
            ]
            tokens = _tokens(network, pair, device, memory_gib=memory_gib)
        classes = train.classes or ()
        scored: list[Scored] = []
        drawn: list[int] = []
        for draw, places in zip(draws, chosen, strict=True):
            rows = torch.from_numpy(np.flatnonzero(np.isin(known.places.numpy(), places)))
            what = _Drawn(draw, rows, held_out_folds(known.labels[rows], seed=draw.seed), len(classes))
            drawn.append(len(rows))
            scored += _pooled_scores(network, known, asked, what, k=config.k, device=device)
            if tokens is not None:
                scored += _attentive_scores(network, tokens, what)
    sizes = Sizes(tuple(drawn), len(known.labels), len(asked.labels), len(classes))
    return report(scored, sizes=sizes, checkpoint=checkpoint, step=network.step, as_json=as_json)


def feature_rows(network: Network) -> list[Row]:
    """What `layer_features` gives, in its order."""
    if not network.depth:
        return [Row(None, "output")]
    kinds = ("patches", "class token") if network.architecture.class_token else ("patches",)
    blocks = [Row(layer + 1, kind) for layer in range(network.depth) for kind in kinds]
    return [*blocks, Row(None, "output")]


def layer_features(network: Network, images: Tensor) -> Tensor:
    """Features of images [B,C,H,W] after every block, and what `Network.features` gives: [B,F,D].

    Tokens are brought to mean 0 and deviation 1, as the next block's norm does but for its gain: the residual
    stream grows with depth. Then the mean of the patches, and the class token where there is one. A model of
    timm has no such blocks: F = 1.
    """
    if not network.depth:
        return network.features(images)[:, None]
    encoded = network.encode(images, layers=range(network.depth))
    first = network.backbone.num_prefix
    features = []
    for stream in encoded.layers:
        tokens = _normed(stream)
        features.append(tokens[:, first:].mean(1))
        if network.architecture.class_token:
            features.append(tokens[:, 0])
    return torch.stack([*features, network.features_of(encoded)], dim=1)


def layer_tokens(network: Network, images: Tensor) -> Tensor:
    """The patch tokens after every block, each at mean 0 and deviation 1: [B,layers,N,D]."""
    encoded = network.encode(images, layers=range(network.depth))
    first = network.backbone.num_prefix
    return torch.stack([_normed(stream[:, first:]) for stream in encoded.layers], dim=1)


def _normed(tokens: Tensor) -> Tensor:
    return F.layer_norm(tokens.float(), tokens.shape[-1:], eps=1e-6)


def _features(
    network: Network,
    source: ImageSource,
    places: np.ndarray,
    *,
    view: EvalView,
    workers: int,
    device: torch.device,
) -> LayerFeatures:
    """Of the images at some places, as far as they can be read."""
    part = Subset(source, places)
    loader = eval_loader(part, view, batch_size=_BATCH, workers=workers)
    found = extract_layers(
        lambda images: layer_features(network, images),
        loader,
        count=-(-len(part) // distributed.world_size()),
        device=device,
    )
    n, per_image, width = found.features.shape
    mib = found.features.nbytes / 2**20
    log.info("%d images, each %d features of width %d: %.0f MiB in float16", n, per_image, width, mib)
    return found._replace(places=torch.from_numpy(places)[found.places])


def _tokens(
    network: Network, images: Sequence[LabelledImages], device: torch.device, *, memory_gib: float
) -> TokenPair:
    """Patch tokens of training and test images, kept where they fit."""
    backbone = network.backbone
    shape = network.depth, math.prod(backbone.grid), backbone.dim
    first, second = (RecomputedTokens(i, lambda x: layer_tokens(network, x), device) for i in images)
    gib = 2 * math.prod(shape) * sum(len(i.labels) for i in images) / 2**30
    if gib > memory_gib:
        log.info(
            "patch tokens of all layers need %.1f GiB in float16, --memory is %g: the network runs again in "
            "each epoch of the attentive probe",
            gib,
            memory_gib,
        )
        return first, second
    log.info("patch tokens of all layers are kept: %.1f GiB in float16", gib)
    return keep(first, shape, device), keep(second, shape, device)


class _Drawn(NamedTuple):
    """The labels of a draw.

    Attributes:
        draw: which.
        rows: int64 [m], of the training images that could be read.
        folds: of these, what is held out, bool [m] each.
        num_classes: L.
    """

    draw: Draw
    rows: Tensor
    folds: list[Tensor]
    num_classes: int


def _pooled_scores(
    network: Network,
    known: LayerFeatures,
    asked: LayerFeatures,
    drawn: _Drawn,
    *,
    k: int,
    device: torch.device,
) -> Iterator[Scored]:
    """k-NN and the linear probe on every row of features."""
    draw, rows, folds, num_classes = drawn
    labels, asked_labels = known.labels[rows].to(device), asked.labels.to(device)
    for number, name in enumerate(feature_rows(network)):
        train = Features(known.features[rows, number].float().to(device), labels)
        test = Features(asked.features[:, number].float().to(device), asked_labels)
        knn = knn_score(train, test, folds, k=k, num_classes=num_classes)
        linear = linear_score(train, test, folds, num_classes=num_classes)
        log.info("%s, %s: k-NN %.2f %%, linear %.2f %%", draw, name, 100 * knn.test, 100 * linear.test)
        yield Scored(draw, name, "k-NN", knn)
        yield Scored(draw, name, "linear", linear)


def _attentive_scores(network: Network, tokens: TokenPair, drawn: _Drawn) -> Iterator[Scored]:
    """The attentive probe on the patches of every block."""
    draw, rows, folds, num_classes = drawn
    heads = network.architecture.heads
    scores = attentive_scores(*tokens, rows, folds, num_heads=heads, num_classes=num_classes, seed=draw.seed)
    patches = [name for name in feature_rows(network) if name.features == "patches"]
    for name, score in zip(patches, scores, strict=True):
        log.info("%s, %s: attentive %.2f %%", draw, name, 100 * score.test)
        yield Scored(draw, name, "attentive", score)
