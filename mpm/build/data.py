"""Images, views and loaders."""

from typing import assert_never

from mpm import config as cfg
from mpm import distributed
from mpm.data.crops import SimpleCrop
from mpm.data.datasets import FolderImages, ImageSource, SyntheticImages, TorchvisionImages
from mpm.data.inaturalist import INaturalistImages
from mpm.data.loading import BatchLoader, ViewDataset, train_loader
from mpm.data.rows import RowCache
from mpm.data.statistics import channel_statistics
from mpm.data.stream import EpochStream
from mpm.data.views import PretrainView, TrainView
from mpm.patchify.masks import BlockMask, MaskSampler, RandomMask
from mpm.patchify.pixels import IMAGENET, INCEPTION, Moments
from mpm.tokenizers.base import Tokenizer


def source(
    config: cfg.Source | cfg.PretrainData, *, image_size: tuple[int, int], channels: int, labelled: bool
) -> ImageSource:
    """The images of a data section; `image_size` is that of synthetic ones."""
    match config:
        case cfg.FolderSource():
            return FolderImages(
                config.root,
                channels=channels,
                labels="folders" if labelled else "none",
                background=config.background,
                max_value=config.max_value,
                index_file=config.index,
            )
        case cfg.TorchvisionSource():
            return TorchvisionImages(
                config.name, root=config.root, split=config.split, channels=channels, download=config.download
            )
        case cfg.INaturalistSource():
            return INaturalistImages(config.root, annotations=config.annotations, channels=channels)
        case cfg.SyntheticSource():
            return SyntheticImages(
                config.count,
                image_size=image_size,
                channels=channels,
                num_classes=config.classes,
                seed=config.seed,
            )
        case _:
            assert_never(config)


def statistics(mean: cfg.Statistics, std: cfg.Statistics, images: ImageSource | None = None) -> Moments:
    """Channel means and deviations as numbers; for `measured` ones the main process looks at the images."""
    named = {"imagenet": IMAGENET, "inception": INCEPTION}
    if "measured" in (mean, std):
        assert images is not None
        named["measured"] = distributed.broadcast_object(
            channel_statistics(images)[:2] if distributed.is_main() else None
        )
    return (
        named[mean][0] if isinstance(mean, str) else mean,
        named[std][1] if isinstance(std, str) else std,
    )


def mask_sampler(config: cfg.PretrainConfig) -> MaskSampler:
    """Draws the masks, in the loader's workers."""
    match config.mask:
        case cfg.RandomMask(unit=unit):
            return RandomMask(config.grid, count=config.num_masked, unit=unit)
        case cfg.BlockMask(min_area=min_area):
            return BlockMask(config.grid, count=config.num_masked, min_area=min_area)


def pretrain_view(
    config: cfg.PretrainConfig | cfg.TokenizerConfig, tokenizer: Tokenizer | None = None
) -> PretrainView:
    """Crops and flips; with masks, and with the tokenizer's view where it is not the network's."""
    data = config.data
    own_size: tuple[int, int] | None = None
    interpolation = data.interpolation if tokenizer is None else tokenizer.interpolation
    if tokenizer is not None:
        assert isinstance(config, cfg.PretrainConfig)
        own_size = tokenizer_view(config, tokenizer)
        if (own_size, interpolation) == (data.image_size, data.interpolation):
            own_size = None
    return PretrainView(
        data.image_size,
        mask_sampler=mask_sampler(config) if isinstance(config, cfg.PretrainConfig) else None,
        crop_scale=data.crop_scale,
        crop_ratio=data.crop_ratio,
        flip=data.flip,
        color_jitter=data.color_jitter,
        interpolation=data.interpolation,
        target_size=own_size,
        target_interpolation=interpolation,
    )


def tokenizer_view(config: cfg.PretrainConfig, tokenizer: Tokenizer) -> tuple[int, int]:
    """Height and width in pixels of the tokenizer's view: a stride for each patch.

    Raises:
        ValueError: if the tokenizer does not fit the images, the patches or the grid.
    """
    assert isinstance(config.objective.target, cfg.CodeTarget)
    told = f"objective.target.tokenizer {config.objective.target.tokenizer}"
    if tokenizer.channels != config.data.channels:
        raise ValueError(
            f"{told} was trained on {tokenizer.channels} channel(s), and data.channels is "
            f"{config.data.channels}; set data.channels={tokenizer.channels}, or train another tokenizer"
        )
    (height, width), patch_size = tokenizer.stride, config.backbone.resolved().patch_size
    if height * patch_size[1] != width * patch_size[0]:
        raise ValueError(
            f"{told} has codes for {height}x{width} pixels, and a patch of {patch_size[0]}x{patch_size[1]} "
            "has another shape; use patches of the same aspect"
        )
    rows, columns = config.grid
    if tokenizer.grid not in (None, config.grid):
        of = f"{tokenizer.grid[0]}x{tokenizer.grid[1]}"
        raise ValueError(
            f"{told} gives {of} codes, but there are {rows}x{columns} patches; use as many: "
            f"data.image_size=[{tokenizer.grid[0] * patch_size[0]}, {tokenizer.grid[1] * patch_size[1]}]"
        )
    return rows * height, columns * width


def train_view(config: cfg.FinetuneData, image_size: tuple[int, int]) -> TrainView:
    """Crops, flips and augments; `config` has numbers for its mean."""
    assert not isinstance(config.mean, str | None)
    return TrainView(
        image_size,
        crop=SimpleCrop(image_size, interpolation=config.interpolation) if config.crop == "simple" else None,
        crop_scale=config.crop_scale,
        crop_ratio=config.crop_ratio,
        flip=config.flip,
        color_jitter=config.color_jitter,
        rand_augment=config.rand_augment,
        three_augment=config.three_augment,
        interpolation=config.interpolation,
        mean=config.mean,
    )


def training_loader(
    config: cfg.PretrainConfig | cfg.TokenizerConfig | cfg.FinetuneConfig,
    images: ImageSource,
    view: PretrainView | TrainView,
    *,
    start: int,
    stop: int,
    pin_memory: bool,
    crops: int | None = None,
    cached: RowCache | None = None,
) -> BatchLoader:
    """This process's micro-batches of steps `start` to `stop`; for `crops` and `cached` see `ViewDataset`."""
    stream = EpochStream(
        len(images),
        config.optim.batch_size,
        seed=config.seed,
        start_step=start,
        stop_step=stop,
        micro_batch=config.run.micro_batch,
        repeats=config.data.repeats if isinstance(config, cfg.FinetuneConfig) else 1,
    )
    dataset = ViewDataset(images, view, seed=config.seed, crops=crops, cached=cached)
    return train_loader(dataset, stream, workers=config.run.workers, pin_memory=pin_memory)
