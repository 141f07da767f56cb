"""A step of every recipe of fine-tuning, on generated images of its own size, with two blocks."""

import math

import pytest
import torch

from mpm import build
from mpm.config import FinetuneConfig
from mpm.data.datasets import SyntheticImages
from mpm.patchify.pixels import Normalize
from mpm.training.loop import train_steps
from tests.test_build import FINETUNE, fine_tuning_config

CPU = torch.device("cpu")
BATCH = 2
CLASSES = {
    "cifar10": 10,
    "cifar100": 100,
    "vitb_beit_cifar100": 100,
    "flowers102": 102,
    "stanford_cars": 196,
    "inat18": 8142,
    "deit3_in21k": 21_841,
}


def shortened(config: FinetuneConfig) -> FinetuneConfig:
    """Two blocks, two images a step; all of it learns, from labels alone."""
    assert config.backbone is not None
    return config.model_copy(
        update={
            "backbone": config.backbone.model_copy(update={"depth": 2}).in_full(classifier=True),
            "optim": config.optim.model_copy(update={"batch_size": BATCH}),
            "distillation": None,
            "tune": "all",
            "run": config.run.model_copy(update={"workers": 0}),
        }
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", FINETUNE)
def test_a_recipe_takes_a_step_at_its_own_size(name: str) -> None:
    config = shortened(fine_tuning_config(name))
    size, channels = config.data.image_size, config.data.channels
    classes = CLASSES.get(name.rpartition("/")[2], 1000)
    images = SyntheticImages(4, image_size=size, channels=channels, num_classes=classes)
    network = build.classifier(
        config, config.backbone, image_size=size, channels=channels, num_classes=classes
    )
    objective = build.supervised(config, network)
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    view = build.train_view(config.data, size)
    moments = (0.5,) * channels
    steps = train_steps(
        objective,
        build.training_loader(config, images, view, start=0, stop=1, pin_memory=False),
        prepare=build.prepare_labelled(
            config, normalize=Normalize(moments, moments), num_classes=classes, device=CPU
        ),
        optimizer=build.optimizer(config.optim, objective),
        lr_at=lambda step: config.optim.lr,
        start=0,
        stop=1,
        clip_norm=config.optim.clip_norm,
        dtype=build.dtype(config.optim),
    )
    (report,) = steps
    # heads start near 0: every class is as likely as any other, up to logits of deviation 0.02 * sqrt(768)
    is_binary = config.loss == "binary_cross_entropy"
    expected, apart = (math.log(2), 0.2) if is_binary else (math.log(classes), 1.5)
    assert report.loss.item() == pytest.approx(expected, abs=apart)
    after = dict(network.named_parameters())
    assert all(parameter.isfinite().all() for parameter in after.values())
    still = [name for name in before if torch.equal(before[name], after[name])]
    # the gradient of a head's weights does not depend on how small they start; what lies below may round to 0
    assert not [name for name in still if name.startswith("heads")]
