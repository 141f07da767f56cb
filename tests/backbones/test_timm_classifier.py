"""Classifiers of timm in the place of ours."""

import pytest
import timm
import timm.optim
import torch

from mpm import build
from mpm.backbones.timm_classifier import TimmClassifier
from mpm.config import AdamWOptim, TimmNetwork
from mpm.objectives.supervised import Classification, cross_entropy


def test_what_timm_says_not_to_decay_does_not() -> None:
    """The oracle is timm's own grouping."""
    network = timm.create_model("test_vit", num_classes=5)
    optim = AdamWOptim(steps=1, batch_size=2, lr=1e-3, weight_decay=0.1)
    ours = build.optimizer(optim, Classification(TimmClassifier(network), loss=cross_entropy))
    theirs = timm.optim.param_groups_weight_decay(
        network, 0.1, no_weight_decay_list=network.no_weight_decay()
    )
    decayed = [
        {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
        for groups in (ours.param_groups, theirs)
    ]
    assert decayed[0] == decayed[1]
    assert id(network.pos_embed) not in decayed[0]


def test_a_model_with_two_heads_is_refused() -> None:
    with pytest.raises(ValueError, match="a head for each of two tokens; give it as a backbone instead"):
        TimmClassifier(timm.create_model("deit_tiny_distilled_patch16_224"))


@pytest.mark.parametrize(("model", "size"), [("test_vit", (64, 96)), ("test_resnet", (50, 40))])
def test_it_is_built_for_the_images_of_the_run(model: str, size: tuple[int, int]) -> None:
    stated = TimmNetwork(model=model)
    network = build.timm_classifier(stated, image_size=size, channels=1, num_classes=5)
    assert network.predict(torch.randn(2, 1, *size)).shape == (2, 5)


@pytest.mark.parametrize(
    ("model", "size", "told"),
    [
        ("test_vit", (60, 64), "data.image_size 60 is not a multiple of the patch_size 16 of network.model"),
        pytest.param(
            "swin_tiny_patch4_window7_224",
            (256, 256),
            "takes images of 224x224 only, not 256x256",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_size_that_does_not_fit_is_told(model: str, size: tuple[int, int], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        build.timm_classifier(TimmNetwork(model=model), image_size=size, channels=3, num_classes=5)
