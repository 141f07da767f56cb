"""The files under configs/: each parses, says how it is run, and states the published numbers."""

from pathlib import Path

import pytest

from mpm.config import FinetuneConfig, PretrainConfig, TokenizerConfig
from mpm.configfile import load

ROOT = Path(__file__).parent.parent / "configs"
FILES = sorted(ROOT.rglob("*.yaml"))


def model_of(path: Path) -> type[PretrainConfig] | type[TokenizerConfig] | type[FinetuneConfig]:
    """By the file's place: what a reader expects there."""
    place = str(path.relative_to(ROOT))
    if "tokenizer" in place:
        return TokenizerConfig
    return FinetuneConfig if "finetune" in place else PretrainConfig


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_file_parses(path: Path) -> None:
    load(path, [], model_of(path))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_header_states_command_hardware_time_result_and_source(path: Path) -> None:
    header = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    script = "finetune.py" if model_of(path) is FinetuneConfig else "pretrain.py"
    assert f"{script} --config configs/{name_of(path)}" in header
    for word in ("Hardware", "Wall time", "result", "Recipe:"):
        assert word.lower() in header.lower()


def test_runs_do_not_share_a_folder() -> None:
    folders = [load(path, [], model_of(path)).config.run.output_dir for path in FILES]
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize(
    ("name", "masked", "patches"),
    [
        ("vitb_mae", 147, 196),
        ("vitl_mae", 147, 196),
        ("vith_mae", 192, 256),
        ("vitb_simmim", 120, 196),
        ("vitb_hmlp", 75, 196),
        ("quickstart/pretrain", 10, 16),
    ],
)
def test_masks_hide_the_published_number(name: str, masked: int, patches: int) -> None:
    config = load(ROOT / f"{name}.yaml", [], PretrainConfig).config
    assert (config.num_masked, config.num_patches) == (masked, patches)


@pytest.mark.parametrize(
    ("name", "lr"),
    [
        ("vitb_mae", 1.5e-4 * 4096 / 256),
        ("vitl_mae", 1.5e-4 * 4096 / 256),
        ("vith_mae", 1.5e-4 * 4096 / 256),
        ("vitb_simmim", 1e-4 * 2048 / 512),
        ("vitb_hmlp", 1.5e-3),
    ],
)
def test_rate_is_the_published_base_rate_scaled(name: str, lr: float) -> None:
    assert load(ROOT / f"{name}.yaml", [], PretrainConfig).config.optim.lr == pytest.approx(lr)


@pytest.mark.parametrize("swap", ["backbone.stem.kind=conv", "backbone.variant=vit_s", "data.kind=synthetic"])
def test_users_command_takes_another_part_by_one_word(swap: str) -> None:
    load(ROOT / "vitb_hmlp.yaml", [swap], PretrainConfig)


def test_quickstart_network_trains_from_scratch_by_one_word() -> None:
    config = load(ROOT / "quickstart/finetune.yaml", ["init=null"], FinetuneConfig).config
    pretrained = load(ROOT / "quickstart/pretrain.yaml", [], PretrainConfig).config
    assert config.init is None
    assert config.backbone is not None
    assert config.backbone.over(pretrained.backbone) == config.backbone
