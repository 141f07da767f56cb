"""Features of teachers against the networks' own code and loops; nothing is downloaded."""

import pytest
import timm
import torch
from timm.models.beit import Beit
from timm.models.cait import Cait
from timm.models.resnet import BasicBlock, ResNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from mpm.backbones.timm_classifier import TimmClassifier
from mpm.objectives.hog import hog
from mpm.objectives.teachers import ClassTeacher, HOGTeacher, NetworkTeacher, PixelTeacher
from mpm.patchify.pixels import Normalize
from tests.networks import DIM, GRID, make_backbone, randomize

NORMALIZE = Normalize((0.5, 0.4, 0.3), (0.2, 0.3, 0.25))
VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 2, "num_classes": 0}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # float32, the same operations


def images_of(height: int, width: int, *, channels: int = 3) -> Tensor:
    return torch.rand(2, channels, height, width)


def resnet() -> ResNet:
    return randomize(ResNet(BasicBlock, (1, 1, 1, 1), channels=(4, 6, 8, 10), num_classes=0)).eval()


VITS = {
    "class token": lambda: VisionTransformer(**VIT),
    "registers": lambda: VisionTransformer(**VIT, reg_tokens=3),
    "no prefix": lambda: VisionTransformer(**VIT, class_token=False, global_pool="avg", fc_norm=False),
    "beit with a norm on patches": lambda: Beit(**VIT, use_rel_pos_bias=True, global_pool="token"),
}


@pytest.mark.parametrize("create", VITS.values(), ids=VITS)
def test_patch_tokens_are_those_of_timm(create) -> None:
    network = randomize(create()).eval()
    images = images_of(16, 16)
    teacher = NetworkTeacher(network, grid=(4, 4), normalize=NORMALIZE)
    expected = network.forward_features(NORMALIZE(images))[:, network.num_prefix_tokens :]
    features = teacher(images)
    assert (teacher.dim, teacher.image_size) == (12, (16, 16))
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, expected, rtol=0, atol=0)


@pytest.mark.parametrize("create", [lambda: VisionTransformer(**VIT, global_pool="avg"), lambda: Beit(**VIT)])
def test_a_norm_of_pooled_tokens_norms_patches(create) -> None:
    network = randomize(create()).eval()
    images = images_of(16, 16)
    assert isinstance(network.norm, nn.Identity)
    expected = network.fc_norm(network.forward_features(NORMALIZE(images))[:, 1:])
    torch.testing.assert_close(
        NetworkTeacher(network, grid=(4, 4), normalize=NORMALIZE)(images), expected, rtol=0, atol=0
    )


def test_a_vit_gets_images_of_its_patches_on_the_wanted_grid() -> None:
    network = randomize(VisionTransformer(**VIT)).eval()
    images = images_of(6, 10)  # patches of 2, where the teacher's are of 4
    other = VisionTransformer(**VIT | {"img_size": (12, 20)}).eval()
    state = network.state_dict()
    table = state["pos_embed"]
    patches = F.interpolate(
        table[:, 1:].reshape(1, 4, 4, 12).permute(0, 3, 1, 2), (3, 5), mode="bicubic", antialias=True
    )
    state["pos_embed"] = torch.cat([table[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)
    other.load_state_dict(state)
    larger = F.interpolate(images, (12, 20), mode="bicubic", antialias=True).clamp(0, 1)
    expected = other.forward_features(NORMALIZE(larger))[:, 1:]
    features = NetworkTeacher(network, grid=(3, 5), normalize=NORMALIZE)(images)
    assert features.shape == (2, 15, 12)
    torch.testing.assert_close(features, expected, **CLOSE)


def test_a_feature_map_is_resized_to_the_wanted_grid() -> None:
    network = resnet()
    images = images_of(64, 96)
    features = NetworkTeacher(network, grid=(4, 6), normalize=NORMALIZE)(images)
    own = network.forward_features(NORMALIZE(images))  # [2,10,2,3]
    expected = F.interpolate(own, (4, 6), mode="bilinear").flatten(2).transpose(1, 2)
    assert own.shape[2:] == (2, 3)
    torch.testing.assert_close(features, expected, **CLOSE)


def test_a_feature_map_on_the_wanted_grid_stays() -> None:
    network = resnet()
    images = images_of(64, 96)
    features = NetworkTeacher(network, grid=(2, 3), normalize=NORMALIZE)(images)
    expected = network.forward_features(NORMALIZE(images)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(features, expected, rtol=0, atol=0)


def test_a_map_with_channels_last_is_read_so() -> None:
    network = SwinTransformer(
        img_size=32, patch_size=4, window_size=2, embed_dim=6, depths=(1, 1), num_heads=(1, 2), num_classes=0
    )
    randomize(network).eval()
    images = images_of(32, 32)
    teacher = NetworkTeacher(network, grid=(4, 4), normalize=NORMALIZE)
    torch.testing.assert_close(
        teacher(images), network.forward_features(NORMALIZE(images)).flatten(1, 2), rtol=0, atol=0
    )
    assert teacher.dim == 12


def test_tokens_of_a_network_for_one_size_are_resized() -> None:
    network = randomize(Cait(**VIT)).eval()
    images = images_of(24, 24)
    teacher = NetworkTeacher(network, grid=(2, 8), normalize=NORMALIZE)  # as many patches as its own grid
    fitting = F.interpolate(images, (16, 16), mode="bicubic", antialias=True).clamp(0, 1)
    own = network.forward_features(NORMALIZE(fitting))[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    expected = F.interpolate(own, (2, 8), mode="bilinear").flatten(2).transpose(1, 2)
    assert teacher.image_size == (16, 16)
    torch.testing.assert_close(teacher(images), expected, **CLOSE)


def test_a_network_that_states_one_size_gets_it() -> None:
    with torch.device("meta"):
        network = timm.create_model("hiera_tiny_224", pretrained=False)
        teacher = NetworkTeacher(network, grid=(14, 14), normalize=Normalize((0.5,), (0.5,)))
        assert teacher.image_size == (224, 224)
        assert teacher(torch.empty(1, 3, 64, 64)).shape == (1, 196, teacher.dim)


def test_patch_tokens_of_a_backbone() -> None:
    backbone, norm = randomize(make_backbone(num_prefix=2)), randomize(nn.LayerNorm(DIM))
    images = images_of(GRID[0] * 4, GRID[1] * 4)
    expected = norm(backbone(NORMALIZE(images)).patches)
    teacher = NetworkTeacher(backbone, grid=GRID, normalize=NORMALIZE, norm=norm)
    assert teacher.dim == DIM
    torch.testing.assert_close(teacher(images), expected, rtol=0, atol=0)
    smaller = F.interpolate(images, (GRID[0] * 2, GRID[1] * 2))
    assert teacher(smaller).shape == expected.shape


def test_a_backbone_for_another_grid_is_an_error() -> None:
    with pytest.raises(ValueError, match="grid is 3x4, where 5x4 is wanted; build it for images of 20x16"):
        NetworkTeacher(make_backbone(), grid=(5, 4), normalize=NORMALIZE)


def test_a_teacher_stays_as_it_is() -> None:
    teacher = NetworkTeacher(resnet(), grid=(4, 4), normalize=NORMALIZE).train()
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    before = [buffer.clone() for buffer in teacher.buffers()]
    assert not teacher(images_of(32, 32).requires_grad_()).requires_grad
    assert all(torch.equal(old, new) for old, new in zip(before, teacher.buffers(), strict=True))


@pytest.mark.parametrize("create", [VITS["class token"], lambda: randomize(make_backbone(grid=(4, 4)))])
def test_matrix_products_have_the_wanted_precision_and_features_are_float32(create) -> None:
    network, images = create().eval(), images_of(16, 16)
    exact, quick = (
        NetworkTeacher(network, grid=(4, 4), normalize=NORMALIZE, dtype=dtype)(images)
        for dtype in (torch.float32, torch.bfloat16)
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = NetworkTeacher(network, grid=(4, 4), normalize=NORMALIZE)(images)
    assert exact.dtype == quick.dtype == torch.float32
    assert torch.equal(quick, expected)
    assert 0 < (quick - exact).abs().max() < 0.05 * exact.abs().max()  # bfloat16 has 8 bits


def test_grey_images_become_what_the_teacher_knows() -> None:
    teacher = NetworkTeacher(resnet(), grid=(2, 2), normalize=NORMALIZE)
    assert teacher.channels == 3
    grey = images_of(64, 64, channels=1)
    torch.testing.assert_close(teacher(grey), teacher(grey.expand(-1, 3, -1, -1)), **CLOSE)


def test_pixels_are_normalised_patch_by_patch() -> None:
    images = images_of(4, 9, channels=2)
    teacher = PixelTeacher((2, 3), channels=2)
    features = teacher(images)
    assert features.shape == (2, 6, teacher.dim) == (2, 6, 12)
    for patch in range(6):
        top, left = patch // 3 * 2, patch % 3 * 3
        block = images[1, :, top : top + 2, left : left + 3].permute(1, 2, 0).flatten()
        expected = (block - block.mean()) / (block.var() + 1e-6).sqrt()
        torch.testing.assert_close(features[1, patch], expected, **CLOSE)


def test_a_flat_patch_has_no_features() -> None:
    features = PixelTeacher((2, 2), channels=3)(torch.full((1, 3, 4, 4), 0.7))
    torch.testing.assert_close(features, torch.zeros(1, 4, 12), rtol=0, atol=1e-3)  # sqrt(1e-6) enlarges dust


def test_gradients_are_told_patch_by_patch() -> None:
    images = images_of(8, 16)
    teacher = HOGTeacher((8, 8), channels=3)
    features = teacher(images)
    assert features.shape == (2, 2, teacher.dim)
    cells = hog(images, cell=(4, 4))  # [B,27,2,4]
    torch.testing.assert_close(features[:, 1], cells[:, :, :, 2:].flatten(1), rtol=0, atol=0)


def classifier() -> TimmClassifier:
    network = ResNet(BasicBlock, (1, 1, 1, 1), channels=(4, 6, 8, 10), num_classes=7)
    return TimmClassifier(randomize(network).train())


def test_a_class_teacher_has_its_own_normalisation() -> None:
    network, images = classifier(), images_of(32, 40)
    teacher = ClassTeacher(network, normalize=NORMALIZE)
    normalised = torch.stack([(images[:, c] - NORMALIZE.mean[c]) / NORMALIZE.std[c] for c in range(3)], dim=1)
    torch.testing.assert_close(teacher(images), network.backbone(normalised), **CLOSE)
    grey = images[:, :1]
    torch.testing.assert_close(teacher(grey), teacher(grey.expand(-1, 3, -1, -1)), **CLOSE)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_class_teacher_has_its_own_resolution(interpolation: str) -> None:
    network, images = classifier(), images_of(32, 40)
    teacher = ClassTeacher(network, normalize=NORMALIZE, image_size=(64, 48), interpolation=interpolation)
    larger = F.interpolate(images, (64, 48), mode=interpolation, antialias=True)
    torch.testing.assert_close(teacher(images), network.backbone(NORMALIZE(larger)), rtol=0, atol=0)
    asked = ClassTeacher(network, normalize=NORMALIZE)(larger)
    torch.testing.assert_close(teacher(larger), asked, rtol=0, atol=0)  # has the size already


def test_a_class_teacher_stays_as_it_is() -> None:
    network = classifier()
    teacher = ClassTeacher(network, normalize=NORMALIZE)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    logits = teacher(images_of(32, 32).requires_grad_())
    assert not logits.requires_grad
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    holder = nn.Module()
    holder.teacher = teacher
    assert not holder.state_dict()  # whatever holds it: not saved, not averaged
