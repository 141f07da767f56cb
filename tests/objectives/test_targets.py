import pytest
import torch
from torch import Tensor

from mpm.objectives.targets import CodeTarget, PixelTarget
from mpm.patchify.pixels import Normalize
from tests.networks import GRID, random_mask, with_hidden

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
CHANNELS = {1: ((0.3,), (0.2,)), 2: ((0.5, 0.2), (0.3, 0.1)), 3: (MEAN, STD)}
N = GRID[0] * GRID[1]


def pixel_target(normalize_patches: bool, channels: int = 3) -> PixelTarget:
    normalize = Normalize(*CHANNELS[channels])
    return PixelTarget((4, 4), normalize=normalize, channels=channels, normalize_patches=normalize_patches)


@pytest.mark.parametrize("channels", CHANNELS)
def test_normalize_and_back(channels: int) -> None:
    normalize, images = Normalize(*CHANNELS[channels]), torch.rand(2, channels, 3, 5)
    found = normalize(images)
    for c, (mean, std) in enumerate(zip(*CHANNELS[channels], strict=True)):
        torch.testing.assert_close(found[:, c], (images[:, c] - mean) / std)
    torch.testing.assert_close(normalize.undo(found), images)


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("normalize_patches", [False, True])
def test_pixel_target_equals_a_loop(normalize_patches: bool, channels: int) -> None:
    images, mask = torch.rand(2, channels, 12, 16), random_mask(2, N, 7)
    target = pixel_target(normalize_patches, channels)
    found = target(images, mask)
    assert found.shape == (2, 7, target.out_dim)
    mean, std = CHANNELS[channels]
    for b in range(2):
        for m, patch in enumerate(mask.masked[b].tolist()):
            top, left = patch // 4 * 4, patch % 4 * 4
            pixels = torch.tensor(
                [
                    (images[b, c, top + p, left + q].item() - mean[c]) / std[c]
                    for p in range(4)
                    for q in range(4)
                    for c in range(channels)
                ]
            )
            if normalize_patches:
                variance = ((pixels - pixels.mean()) ** 2).sum() / (len(pixels) - 1)
                pixels = (pixels - pixels.mean()) / (variance + 1e-6).sqrt()
            torch.testing.assert_close(found[b, m], pixels, rtol=1e-5, atol=1e-5)


def test_norm_pix_equals_lightlys() -> None:
    from lightly.models.utils import get_at_index, normalize_mean_var, patchify

    images, mask = torch.rand(2, 3, 16, 16), random_mask(2, 16, 7)
    patches = patchify(Normalize(MEAN, STD)(images), 4)
    expected = normalize_mean_var(get_at_index(patches, mask.masked), dim=-1)
    torch.testing.assert_close(pixel_target(True)(images, mask), expected)


def test_predicting_nothing_costs_the_trivial_baseline() -> None:
    """Norm-pix targets divide by the unbiased deviation: their mean square is (k - 1) / k."""
    targets = pixel_target(True)(torch.rand(16, 3, 12, 16), random_mask(16, N, 9))
    k = targets.shape[-1]
    assert targets.square().mean().item() == pytest.approx((k - 1) / k, rel=1e-5)


def test_an_even_patch_is_no_division_by_zero() -> None:
    target, mask = pixel_target(True), random_mask(2, N, 7)
    assert target(torch.full((2, 3, 12, 16), 0.5), mask).isfinite().all()


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("normalize_patches", [False, True])
def test_rendering_the_truth_gives_the_image_back(normalize_patches: bool, channels: int) -> None:
    target, images, mask = (
        pixel_target(normalize_patches, channels),
        torch.rand(2, channels, 12, 16),
        random_mask(2, N, 7),
    )
    rendered = target.render(target(images, mask), images, mask)
    torch.testing.assert_close(rendered, images, rtol=0, atol=1e-6)


def test_rendering_draws_at_masked_patches_only() -> None:
    target, images, mask = pixel_target(False), torch.rand(2, 3, 12, 16), random_mask(2, N, 7)
    rendered = target.render(torch.zeros(2, 7, 48), images, mask)  # zero is the channel mean
    mean = torch.tensor(MEAN).reshape(3, 1, 1).expand(2, 3, 12, 16)
    torch.testing.assert_close(rendered, with_hidden(images, mask, mean), rtol=0, atol=1e-6)


def test_rendering_norm_pix_uses_the_true_patches_moments() -> None:
    """A prediction of zero is drawn as the mean of the true patch, channels together."""
    target, images, mask = pixel_target(True), torch.rand(2, 3, 12, 16), random_mask(2, N, 7)
    rendered = target.normalize(target.render(torch.zeros(2, 7, 48), images, mask))
    truth = target.normalize(images)
    for b in range(2):
        for patch in mask.masked[b].tolist():
            top, left = patch // 4 * 4, patch % 4 * 4
            box = (b, slice(None), slice(top, top + 4), slice(left, left + 4))
            expected = truth[box].mean().expand(3, 4, 4)
            torch.testing.assert_close(rendered[box], expected, rtol=0, atol=1e-5)


def test_rendered_images_stay_displayable() -> None:
    target, images, mask = pixel_target(False), torch.rand(2, 3, 12, 16), random_mask(2, N, 7)
    rendered = target.render(torch.full((2, 7, 48), 100.0).bfloat16(), images, mask)
    assert rendered.min() >= 0
    assert rendered.max() == 1


class Stripes:
    """The code of a 2x2 patch is its first pixel in tenths; it decodes to patches of that value."""

    vocab_size, stride, channels, grid, interpolation = 11, (2, 2), 1, None, "bicubic"

    def encode(self, images: Tensor) -> Tensor:
        return (images[:, 0, ::2, ::2] * 10).round().long().flatten(1)

    def decode(self, codes: Tensor, grid: tuple[int, int]) -> Tensor | None:
        return (codes.reshape(-1, 1, *grid) / 10).repeat_interleave(2, 2).repeat_interleave(2, 3)


def test_code_target_is_the_tokenizers_codes_at_masked_patches() -> None:
    images, mask = torch.rand(3, 1, 6, 8), random_mask(3, 12, 5)
    target = CodeTarget(Stripes(), patch_size=(4, 4), draw=lambda codes, grid: None)
    found = target(images, mask)
    for row, masked in enumerate(mask.masked.tolist()):
        whole = [round(10 * images[row, 0, 2 * (p // 4), 2 * (p % 4)].item()) for p in masked]
        assert found[row].tolist() == whole
    assert target.out_dim == 11


@pytest.mark.parametrize("decodes", [True, False])
def test_likeliest_codes_are_drawn_at_masked_patches_only(decodes: bool) -> None:
    """Where the tokenizer has no decoder, by the given pictures of codes."""
    images, mask = torch.rand(2, 1, 12, 16), random_mask(2, 12, 5)
    codes = torch.randint(11, (2, 5))
    tokenizer = Stripes()
    draw = tokenizer.decode
    if not decodes:
        tokenizer.decode = lambda codes, grid: None
    target = CodeTarget(tokenizer, patch_size=(4, 4), draw=draw)
    drawn = target.render(torch.nn.functional.one_hot(codes, 11).float(), images, mask)
    assert drawn.shape == images.shape
    middle = torch.nn.functional.interpolate(drawn, (12, 16))[:, :, 1::4, 1::4].flatten(1)
    expected = codes / 10
    assert (middle.gather(1, mask.masked) - expected).abs().max() < 0.26  # neighbours show through the resize
    hidden = with_hidden(images, mask, 0.0)
    assert torch.equal(with_hidden(drawn, mask, 0.0), hidden)
