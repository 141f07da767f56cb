"""BEiT v2's tokenizer: published sizes, and codes against code written out."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mpm.backbones.create import create_backbone
from mpm.backbones.initialization import initialize
from mpm.objectives.vqkd import VQKDTraining
from mpm.patchify.pixels import Normalize
from mpm.tokenizers.vqkd import VQKD
from mpm.variants import Architecture
from tests.networks import DIM, GRID, make_backbone, randomize

VIT_B = Architecture((16, 16), dim=768, depth=12, heads=12, qkv_bias="query_value")
CLASS_SLOT = 768  # the released layout has a position for the class token, mpm's token carries its own
CODEBOOK = 2 * 8192 * 32 + 8192  # released as parameters: vectors, a copy of them, how often each was used


def make_vqkd(*, num_codes: int = 11, code_dim: int = 5) -> VQKD:
    tokenizer = VQKD(
        make_backbone(),
        num_codes=num_codes,
        code_dim=code_dim,
        normalize=Normalize((0.5, 0.4, 0.3), (0.2, 0.3, 0.25)),
        channels=3,
    )
    randomize(tokenizer)
    tokenizer.codebook.vectors.copy_(F.normalize(torch.randn(num_codes, code_dim), dim=1))
    return tokenizer.eval()


def images_of(batch: int) -> Tensor:
    return torch.rand(batch, 3, GRID[0] * 4, GRID[1] * 4)


@pytest.mark.parametrize(("depth", "published"), [(1, 95_187_488), (3, 109_361_696)])
def test_parameters_are_as_many_as_published(depth: int, published: int) -> None:
    with torch.device("meta"):
        backbone = create_backbone(VIT_B, image_size=(224, 224))
        tokenizer = VQKD(
            backbone, num_codes=8192, code_dim=32, normalize=Normalize((0.5,), (0.5,)), channels=3
        )
        training = VQKDTraining(tokenizer, feature_dim=512, decoder_depth=depth, num_heads=12, seed=0)
    assert sum(p.numel() for p in tokenizer.parameters()) + CLASS_SLOT == 86_404_640
    assert sum(p.numel() for p in training.parameters()) + 2 * CLASS_SLOT + CODEBOOK == published


def test_a_code_is_the_nearest_of_unit_vectors() -> None:
    tokenizer, images = make_vqkd(), images_of(3)
    tokens = F.layer_norm(
        tokenizer.backbone(tokenizer.normalize(images)).patches,
        (DIM,),
        tokenizer.norm.weight,
        tokenizer.norm.bias,
        eps=1e-6,
    )
    first, _, last = tokenizer.task_layer
    vectors = torch.tanh(tokens @ first.weight.T + first.bias) @ last.weight.T + last.bias
    vectors = vectors / vectors.norm(dim=-1, keepdim=True)
    codes = tokenizer.encode(images)
    assert codes.shape == (3, GRID[0] * GRID[1])
    assert codes.dtype == torch.int64
    distances = (vectors[:, :, None] - tokenizer.codebook.vectors).square().sum(-1)
    assert torch.equal(codes, distances.argmin(-1))
    assert codes.unique().numel() > 3


def test_an_image_has_the_same_codes_in_every_batch() -> None:
    tokenizer, images = make_vqkd(), images_of(5)
    alone = torch.cat([tokenizer.encode(image[None]) for image in images])
    assert torch.equal(tokenizer.encode(images), alone)
    assert torch.equal(tokenizer.encode(images.flip(0)).flip(0), alone)


def test_the_task_layer_is_not_autocast() -> None:
    tokenizer, images = make_vqkd(), images_of(2)
    seen: list[torch.dtype] = []
    tokenizer.task_layer[0].register_forward_hook(lambda *call: seen.append(call[2].dtype))
    tokenizer.backbone.blocks[0].mlp.fc1.register_forward_hook(lambda *call: seen.append(call[2].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        vectors = tokenizer.project(images)
    assert seen == [torch.bfloat16, torch.float32]
    assert vectors.dtype == torch.float32


def test_it_is_a_tokenizer() -> None:
    tokenizer = make_vqkd()
    assert (tokenizer.vocab_size, tokenizer.stride, tokenizer.grid) == (11, (4, 4), GRID)
    assert (tokenizer.channels, tokenizer.interpolation) == (3, "bicubic")
    assert not tokenizer.encode(images_of(1)).requires_grad
    assert tokenizer.decode(tokenizer.encode(images_of(1)), GRID) is None


def test_images_of_another_size_are_an_error() -> None:
    with pytest.raises(ValueError, match="images are 16x16, but the tokenizer's positions are for 12x16"):
        make_vqkd().encode(torch.rand(1, 3, 16, 16))


@pytest.mark.parametrize("scheme", ["vit", "beit_finetuning"])
def test_every_value_has_a_start(scheme: str) -> None:
    tokenizer = make_vqkd()
    constants = [tokenizer.normalize.mean.clone(), tokenizer.normalize.std.clone()]
    for tensor in (*tokenizer.parameters(), *tokenizer.codebook.buffers()):
        tensor.data.fill_(torch.nan) if tensor.is_floating_point() else tensor.data.fill_(1)
    initialize(tokenizer, scheme)
    assert all(tensor.isfinite().all() for tensor in (*tokenizer.parameters(), *tokenizer.buffers()))
    assert not tokenizer.codebook.started
    assert torch.equal(tokenizer.normalize.mean, constants[0])
    assert 0.01 < tokenizer.task_layer[0].weight.std() < 0.03
    assert not tokenizer.task_layer[0].bias.any()


def test_a_state_dict_holds_all_of_it() -> None:
    tokenizer, other = make_vqkd(), make_vqkd()
    images = images_of(2)
    assert not torch.equal(tokenizer.encode(images), other.encode(images))
    other.load_state_dict(tokenizer.state_dict())
    assert torch.equal(tokenizer.encode(images), other.encode(images))
