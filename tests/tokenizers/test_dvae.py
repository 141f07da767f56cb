"""The discrete autoencoder against the published sizes, names and arithmetic."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mpm.patchify.pixels import Normalize
from mpm.tokenizers.base import Tokenizer
from mpm.tokenizers.dvae import DiscreteVAE

Shapes = dict[str, tuple[int, ...]]


def make_dvae(
    *, channels: int = 3, layers: int = 2, blocks: int = 1, num_codes: int = 32, hidden: int = 8
) -> DiscreteVAE:
    normalize = Normalize((0.4,) * channels, (0.25,) * channels)
    return DiscreteVAE(
        num_codes,
        code_dim=6,
        hidden=hidden,
        layers=layers,
        blocks=blocks,
        channels=channels,
        normalize=normalize,
    )


def make_published() -> DiscreteVAE:
    with torch.device("meta"):
        return DiscreteVAE(normalize=Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)))


def published_shapes(codes: int, code_dim: int, hidden: int, layers: int, channels: int) -> Shapes:
    """Of BEiT's `customized` tokenizer: in both halves a convolution and one residual block in turn."""
    shapes: Shapes = {"codebook.weight": (codes, code_dim)}

    def add(name: str, weight: tuple[int, ...], bias: int) -> None:
        shapes[f"{name}.weight"] = weight
        shapes[f"{name}.bias"] = (bias,)

    for layer in range(layers):
        first_in, first_out = (channels, code_dim) if layer == 0 else (hidden, hidden)
        add(f"encoder.{2 * layer}.0", (hidden, first_in, 4, 4), hidden)
        add(f"decoder.{2 * layer}.0", (first_out, hidden, 4, 4), hidden)  # transposed: inputs come first
        for half in ("encoder", "decoder"):
            for number, kernel in ((0, 3), (2, 3), (4, 1)):
                add(f"{half}.{2 * layer + 1}.net.{number}", (hidden, hidden, kernel, kernel), hidden)
    add(f"encoder.{2 * layers}", (codes, hidden, 1, 1), codes)
    add(f"decoder.{2 * layers}", (channels, hidden, 1, 1), channels)
    return shapes


def naive_half(state: dict[str, Tensor], half: str, layers: int, x: Tensor) -> Tensor:
    """Encoder or decoder, one operation at a time."""

    def parameters(name: str) -> tuple[Tensor, Tensor]:
        return state[f"{half}.{name}.weight"], state[f"{half}.{name}.bias"]

    sampled = F.conv2d if half == "encoder" else F.conv_transpose2d
    for layer in range(layers):
        x = sampled(x, *parameters(f"{2 * layer}.0"), stride=2, padding=1).relu()
        inner = F.conv2d(x, *parameters(f"{2 * layer + 1}.net.0"), padding=1).relu()
        inner = F.conv2d(inner, *parameters(f"{2 * layer + 1}.net.2"), padding=1).relu()
        x = x + F.conv2d(inner, *parameters(f"{2 * layer + 1}.net.4"))
    return F.conv2d(x, *parameters(str(2 * layers)))


def test_the_defaults_have_the_published_parameters() -> None:
    dvae = make_published()
    assert sum(p.numel() for p in dvae.parameters()) == 20_081_411
    assert sum(p.numel() for p in dvae.encoder.parameters()) == 7_953_408
    assert dvae.stride == (8, 8)


def test_its_state_has_the_published_names_and_shapes() -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in make_published().state_dict().items()}
    normalize = {f"normalize.{name}": (3, 1, 1) for name in ("mean", "std")}
    assert shapes == published_shapes(8192, 512, 256, 3, 3) | normalize


@pytest.mark.parametrize(("layers", "channels", "size"), [(2, 3, (12, 8)), (3, 1, (8, 16)), (1, 4, (6, 6))])
def test_both_halves_are_the_published_arithmetic(layers: int, channels: int, size: tuple[int, int]) -> None:
    dvae = make_dvae(layers=layers, channels=channels).double()
    state = dvae.state_dict()
    images = torch.rand(2, channels, *size, dtype=torch.float64)
    expected = naive_half(state, "encoder", layers, (images - 0.4) / 0.25)
    assert expected.shape == (2, 32, size[0] // 2**layers, size[1] // 2**layers)
    torch.testing.assert_close(dvae.logits(images), expected, rtol=0, atol=1e-6)  # mean and std are float32

    codes = dvae.encode(images)
    assert torch.equal(codes, expected.argmax(1).flatten(1))
    vectors = state["codebook.weight"][codes].mT.unflatten(2, expected.shape[2:])
    told = naive_half(state, "decoder", layers, vectors) * 0.25 + 0.4
    decoded = dvae.decode(codes, (expected.shape[2], expected.shape[3]))
    assert decoded.shape == images.shape
    torch.testing.assert_close(decoded.double(), told.clamp(0, 1), rtol=0, atol=1e-6)


def test_decoded_images_are_clamped_and_outside_autograd() -> None:
    dvae = make_dvae()
    dvae.decoder[-1].bias.data = torch.tensor([-9.0, 0.0, 9.0])
    images = dvae.decode(torch.randint(32, (2, 6)), (2, 3))
    assert images.shape == (2, 3, 8, 12)
    assert images[:, 0].eq(0).all()
    assert images[:, 1].gt(0).all()
    assert images[:, 2].eq(1).all()
    assert not images.requires_grad


def test_codes_are_row_major() -> None:
    dvae = make_dvae(num_codes=512, hidden=32)
    image = torch.rand(1, 3, 32, 32)
    codes = dvae.encode(image).reshape(8, 8)
    crop = dvae.encode(image[..., 16:]).reshape(8, 4)
    # where the receptive field does not reach over the cut
    assert torch.equal(codes[:, 7:], crop[:, 3:])
    assert len(codes.unique()) > 4


@pytest.mark.parametrize("training", [True, False])
def test_codes_of_an_image_do_not_depend_on_its_batch(training: bool) -> None:
    dvae = make_dvae().train(training)
    images = torch.rand(5, 3, 16, 16)
    together = dvae.encode(images)
    assert together.dtype == torch.int64
    assert together.shape == (5, 16)
    alone = torch.cat([dvae.encode(image[None]) for image in images])
    assert torch.equal(together, alone)
    assert torch.equal(dvae.encode(images.flip(0)), together.flip(0))


@pytest.mark.parametrize("blocks", [0, 2])
def test_residual_blocks_are_as_many_after_each_convolution(blocks: int) -> None:
    dvae = make_dvae(blocks=blocks, layers=2)
    assert len(dvae.encoder) == len(dvae.decoder) == 2 * (1 + blocks) + 1
    assert dvae.logits(torch.rand(1, 3, 8, 8)).shape == (1, 32, 2, 2)


def test_every_parameter_has_a_start_value() -> None:
    dvae = make_dvae(hidden=16)
    for parameter in dvae.parameters():
        parameter.data.fill_(torch.nan)
    dvae.reset_parameters()
    for name, parameter in dvae.named_parameters():
        assert parameter.isfinite().all(), name
    bound = (3 * 4 * 4) ** -0.5
    first = dvae.encoder[0][0]
    for parameter in (first.weight, first.bias):
        assert 0.7 * bound < parameter.abs().max() <= bound


def test_the_start_values_are_those_of_the_constructor() -> None:
    torch.manual_seed(3)
    dvae = make_dvae()
    torch.manual_seed(3)
    dvae.reset_parameters()
    again = dvae.state_dict()
    torch.manual_seed(3)
    assert all(torch.equal(again[name], value) for name, value in make_dvae().state_dict().items())


def test_it_is_a_tokenizer() -> None:
    tokenizer: Tokenizer = make_dvae(layers=3, channels=4)
    assert tokenizer.vocab_size == 32
    assert tokenizer.stride == (8, 8)
    assert tokenizer.channels == 4
    assert tokenizer.interpolation == "bicubic"
