import pytest
import torch

from mpm.backbones.cost import forward_macs
from mpm.patchify.stems import HierarchicalMLPStem, LinearStem
from tests.networks import make_backbone


@pytest.mark.parametrize(
    ("dim", "hmlp", "linear"),
    [
        (192, 21_676_032, 28_901_376),
        (384, 72_253_440, 57_802_752),
        (768, 260_112_384, 115_605_504),
        (1024, 449_576_960, 154_140_672),
    ],
)
def test_stems_cost_what_the_formula_says(dim: int, hmlp: int, linear: int) -> None:
    """At 224 pixels: n (16 * 48 q + 16 q^2 + 4 q D) with q = D / 4, and n * 768 D."""
    with torch.device("meta"):
        images = torch.empty(1, 3, 224, 224)
        stems = HierarchicalMLPStem((16, 16), dim), LinearStem((16, 16), dim)
    assert [forward_macs(stem, images) for stem in stems] == [hmlp, linear]


@pytest.mark.parametrize(("dim", "depth", "heads", "gmacs"), [(192, 12, 3, 1.254), (768, 12, 12, 17.564)])
def test_backbones_cost_what_the_papers_say(dim: int, depth: int, heads: int, gmacs: float) -> None:
    with torch.device("meta"):
        stem = LinearStem((16, 16), dim)
        backbone = make_backbone(stem, grid=(14, 14), dim=dim, depth=depth, heads=heads)
        images = torch.empty(1, 3, 224, 224)
    head = 1000 * dim
    assert (forward_macs(backbone, images) + head) / 1e9 == pytest.approx(gmacs, abs=6e-4)
