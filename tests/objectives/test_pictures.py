import pytest
import torch

from mpm.backbones.initialization import initialize
from mpm.objectives.pictures import displayable, reconstructions
from mpm.objectives.targets import PixelTarget
from mpm.patchify.pixels import Normalize
from tests.networks import GRID, make_backbone, make_masked, random_mask, with_hidden

NORMALIZE = Normalize((0.5, 0.4, 0.3), (0.2, 0.3, 0.25))
GAP = 4


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 13])
def test_any_number_of_channels_can_be_looked_at(channels: int) -> None:
    images = torch.rand(2, channels, 4, 6) * 1.2 - 0.1
    found = displayable(images)
    assert (found.shape, found.dtype) == ((2, 3, 4, 6), torch.uint8)
    for c in range(3):
        shown = (
            images[:, 0 if channels == 1 else c] if channels == 1 or c < channels else torch.zeros(2, 4, 6)
        )
        expected = (shown.clamp(0, 1) * 255).round()
        assert torch.equal(found[:, c].float(), expected)


@pytest.mark.parametrize("method", ["mae", "simmim"])
@pytest.mark.parametrize("normalize_patches", [False, True])
def test_a_sheet_of_original_masked_and_reconstructed(method: str, normalize_patches: bool) -> None:
    objective = make_masked(method, make_backbone()).eval()
    initialize(objective, "mae")
    target = PixelTarget((4, 4), normalize=NORMALIZE, channels=3, normalize_patches=normalize_patches)
    images, mask = torch.rand(2, 3, 12, 16), random_mask(2, GRID[0] * GRID[1], 7)
    sheet = reconstructions(objective, target, images, mask, normalize=NORMALIZE)
    scale = 8  # 12 px are enlarged to 96
    height, width = 12 * scale + GAP, 16 * scale + GAP
    assert (sheet.shape, sheet.dtype) == ((3, 3 * height, 2 * width), torch.uint8)

    tiles = sheet.reshape(3, 3, height, 2, width).permute(1, 3, 0, 2, 4)  # row, image
    assert tiles[..., -GAP:, :].eq(255).all()
    assert tiles[..., -GAP:].eq(255).all()
    tiles = tiles[..., : scale * 12, : scale * 16]
    small = tiles[..., ::scale, ::scale]
    assert torch.equal(tiles, small.repeat_interleave(scale, -1).repeat_interleave(scale, -2))
    original, masked, drawn = small
    assert torch.equal(original, displayable(images))
    assert torch.equal(masked, displayable(with_hidden(images, mask, 0.5)))
    hidden = with_hidden(torch.zeros_like(images), mask, 1.0).bool()
    predictions = objective.predict(NORMALIZE(images), mask)[0].detach()
    expected = displayable(target.render(predictions, images, mask))
    torch.testing.assert_close(drawn, expected, rtol=0, atol=1)  # rounding
    difference = (drawn.int() - original.int()).abs()
    assert difference[~hidden].max() <= 1
    assert difference[hidden].float().mean() > 10


def test_large_images_are_not_enlarged() -> None:
    objective = make_masked("simmim", make_backbone(grid=(24, 25))).eval()
    initialize(objective, "vit")
    target = PixelTarget((4, 4), normalize=NORMALIZE, channels=3, normalize_patches=False)
    images, mask = torch.rand(1, 3, 96, 100), random_mask(1, 600, 200)
    sheet = reconstructions(objective, target, images, mask, normalize=NORMALIZE)
    assert sheet.shape == (3, 3 * (96 + GAP), 100 + GAP)
    assert not sheet.requires_grad
