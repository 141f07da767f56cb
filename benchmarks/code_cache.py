"""What do a tokenizer's codes cost in a step of BEiT, computed in it, or cached by `mpm tokenize`?

    python -m benchmarks.code_cache --out benchmarks/results/DATE_code_cache_cpu.jsonl
    python -m benchmarks.code_cache --device cuda --batch 256 --steps 20 --out benchmarks/results/DATE_...

A step is forward, backward and AdamW of `configs/vitb_beit.yaml` (ViT-B/16, 224 px, 75 of 196 patches masked,
bf16), run by `train_steps` on images in memory. The tokenizers have random weights, which changes no time:

    dalle      the encoder of DALL-E, 53.8 M parameters, 8192 codes, at 112 px
    vqkd       BEiT v2's, a ViT-B/16 with 8192 codes of width 32, at 224 px
    kmeans     the nearest of 8192 centroids of normalised 16x16 patches

each in bf16, and in fp32, which `objective.target.dtype=auto` falls back to where too many codes differ.

Contenders, one network for all of them, in turns:

    computed   the tokenizer runs in `prepare`, on its own view of the crop
    cached     codes are read from a `RowCache` in each step, as a loader worker does
    given      codes are there: no tokenizer at all, the least that a step can take

How to read the answer: a line for each tokenizer and dtype with two comparisons, per round A B B A:
`ratio` is computed / cached, what the cache saves, and `over_given` is cached / given, what it costs.
`loader` are the seconds of one thread for a crop of a 500x375 image, rendered with the tokenizer's view,
which a cache makes needless, and without. `equal_codes` are shares of the codes in the file that are those
of the step, and of the image alone (a batch of 1): kernels of another batch size may round the other way
where two codes are as near. Codes of trained tokenizers are farther apart than those of random ones.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.measuring import Comparison, Results, interleaved, peak_memory_bytes, significant
from mpm import build, configfile
from mpm.config import PretrainConfig, TokenizerConfig
from mpm.data.codes import create_code_cache, open_code_cache
from mpm.data.loading import PretrainBatch, ViewDataset
from mpm.data.rows import RowCache
from mpm.data.stream import SampleKey
from mpm.data.views import PretrainView, sample_generator
from mpm.objectives.masked import MaskedPrediction
from mpm.objectives.prepare import PrepareMasked
from mpm.objectives.targets import CodeTarget
from mpm.patchify.pixels import Normalize, to_unit
from mpm.run import compile_blocks
from mpm.training.allocator import keep_freed_memory
from mpm.training.loop import train_steps

CONFIGS = Path(__file__).parents[1] / "configs"
TOKENIZERS = ("dalle", "vqkd", "kmeans")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROWS, COLUMNS = 375, 500  # of an image before the crop, the middle one of ImageNet
LR = 1e-6


class Pictures:
    """`noise` in memory."""

    classes = None

    def __init__(self, count: int):
        self._pixels = (noise(count, ROWS, COLUMNS) * 255).to(torch.uint8)

    def __len__(self) -> int:
        return len(self._pixels)

    def read(self, index: int) -> Tensor:
        return self._pixels[index]

    def label(self, index: int) -> int:
        raise NotImplementedError

    def name(self, index: int) -> str:
        return str(index)


def create_tokenizer(name: str, device: torch.device) -> Any:
    """With random weights, frozen; many codes occur in `noise`."""
    torch.manual_seed(0)
    if name == "dalle":
        from mpm.tokenizers.dalle import DalleEncoder

        built: Any = DalleEncoder()
    else:
        file = CONFIGS / "tokenizers" / {"vqkd": "vqkd_vitb.yaml", "kmeans": "kmeans_in1k.yaml"}[name]
        normalize = Normalize(*build.statistics("inception", "inception"))
        built = build.tokenizer(configfile.load(file, [], TokenizerConfig).config, normalize)
        for parameter in built.parameters():
            nn.init.trunc_normal_(parameter, std=0.05)
    built = built.to(device).eval().requires_grad_(False)
    images = noise(4, 224, 224).to(device)
    with torch.no_grad():
        if name == "dalle":  # no code has an advantage over the others
            built.blocks.output.conv.b -= built.logits(images).mean((0, 2, 3))
        else:
            found = (built.project if name == "vqkd" else built.vectors)(images).flatten(0, 1)
            spread = torch.randn(built.vocab_size, found.shape[1], device=device) * found.std(0)
            built.codebook.vectors.copy_(found.mean(0) + spread)
            if name == "vqkd":
                built.codebook.vectors.copy_(nn.functional.normalize(built.codebook.vectors, dim=-1))
            built.codebook.started.fill_(True)
    return built


def noise(count: int, H: int, W: int) -> Tensor:
    """Images [count,3,H,W] in [0,1], coarse shapes and fine noise."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, H // 16, W // 16, generator=generator)
    images = nn.functional.interpolate(coarse, (H, W), mode="bicubic")
    return images.add_(torch.randn(images.shape, generator=generator), alpha=0.1).clamp_(0, 1)


class Steps:
    """One network and optimizer that every contender's batches train."""

    def __init__(self, config: PretrainConfig, target: CodeTarget, device: torch.device):
        normalize = Normalize(*build.statistics("imagenet", "imagenet")).to(device)
        self.objective: MaskedPrediction = build.objective(config, target.out_dim).to(device)
        compile_blocks(self.objective, config.run.compile, device)
        self._prepare = PrepareMasked(
            target, normalize=normalize, num_masked=config.num_masked, device=device
        )
        self._optimizer = build.optimizer(config.optim, self.objective)
        self._dtype = build.dtype(config.optim)
        self._device = device

    def on(self, batches: Iterator[PretrainBatch], *, steps: int) -> Callable[[], list[float]]:
        """A turn: so many steps, and their seconds."""
        reports = train_steps(
            self.objective,
            batches,
            prepare=self._prepare,
            optimizer=self._optimizer,
            lr_at=lambda step: LR,
            start=0,
            stop=10**9,
            dtype=self._dtype,
        )

        def turn() -> list[float]:
            seconds = []
            for _ in range(steps):
                begin = time.perf_counter()
                next(reports)
                if self._device.type == "cuda":
                    torch.cuda.synchronize(self._device)
                seconds.append(time.perf_counter() - begin)
            return seconds

        return turn


def fill(path: Path, target: CodeTarget, images: Tensor, *, batch: int) -> RowCache:
    """The codes of images in [0,1] in a cache, one crop of each."""
    grid = [side // stride for side, stride in zip(images.shape[2:], target.tokenizer.stride, strict=True)]
    sizes = {"crops": 1, "images": len(images), "num_patches": grid[0] * grid[1]}
    with create_code_cache(path, fingerprint={}, **sizes, vocab_size=target.out_dim) as cache:
        for first in range(0, len(images), batch):
            cache.write(0, first, target.codes(images[first : first + batch]).cpu().numpy())
    return open_code_cache(path, fingerprint={})


def render_seconds(view: PretrainView, source: Pictures, *, repeats: int) -> dict[str, float]:
    """For one crop, with the tokenizer's view and without."""
    seconds: dict[str, list[float]] = {"with_target": [], "without_target": []}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for repeat in range(repeats):
        for name, with_target in (("with_target", True), ("without_target", False)):
            rngs = (sample_generator(0, repeat, 0, 0, stream=stream) for stream in (0, 1))
            begin = time.perf_counter()
            view(source.read(repeat % len(source)), *rngs, with_target=with_target)
            seconds[name].append(time.perf_counter() - begin)
    torch.set_num_threads(threads)
    return {name: significant(statistics.median(values)) for name, values in seconds.items()}


def measure(
    name: str, dtype: str, config: PretrainConfig, device: torch.device, arguments: argparse.Namespace
) -> tuple[dict[str, Any], Comparison]:
    tokenizer = create_tokenizer(name, device)
    no_picture = {"draw": lambda codes, grid: torch.empty(0)}
    target = CodeTarget(
        tokenizer, patch_size=config.backbone.resolved().patch_size, dtype=DTYPES[dtype], **no_picture
    )
    count = arguments.batch
    source = Pictures(count)
    view = build.pretrain_view(config, tokenizer)
    keys = [SampleKey(0, image, 0) for image in range(count)]
    batch = ViewDataset(source, view, seed=0, crops=1).__getitems__(keys).batch
    own = batch.images if batch.target_images is None else batch.target_images
    images = to_unit(own, device)
    computed = target.codes(images)
    with tempfile.TemporaryDirectory() as folder:
        cache = fill(Path(folder) / "codes", target, images, batch=arguments.fill_batch)
        stored = read(cache, count)
        alone = torch.cat([target.codes(images[row : row + 1]) for row in range(min(count, 16))])
        equal = {
            "step": float((stored == computed.cpu()).float().mean()),
            "alone": float((stored[: len(alone)] == alone.cpu()).float().mean()),
        }
        batch = PretrainBatch(*(None if part is None else part.to(device) for part in batch))
        plain = batch._replace(target_images=None)

        def with_cache() -> Iterator[PretrainBatch]:
            while True:
                yield plain._replace(codes=read(cache, count))

        def repeated(given: PretrainBatch) -> Iterator[PretrainBatch]:
            while True:
                yield given

        steps = Steps(config, target, device)
        turns = {
            "computed": steps.on(repeated(batch), steps=arguments.steps),
            "cached": steps.on(with_cache(), steps=arguments.steps),
            "given": steps.on(repeated(plain._replace(codes=computed)), steps=arguments.steps),
        }
        for turn in turns.values():
            for _ in range(arguments.warmup):
                turn()
        comparison = interleaved(turns["cached"], turns["computed"], rounds=arguments.rounds)
        over_given = interleaved(turns["given"], turns["cached"], rounds=arguments.rounds)
    speed = {
        "computed": count / statistics.median(comparison.theirs_s),
        "cached": count / statistics.median(comparison.ours_s),
        "given": count / statistics.median(over_given.ours_s),
    }
    return {
        **comparison.record("cached", "computed"),
        "over_given": over_given.record("given", "cached"),
        "images_per_s": {contender: significant(value) for contender, value in speed.items()},
        "equal_codes": equal,
        "distinct_codes": int(computed.unique().numel()),
        "loader": render_seconds(view, source, repeats=arguments.renderings),
        "cache_bytes_per_image": 2 * config.num_patches,
        "tokenizer_parameters": sum(part.numel() for part in tokenizer.parameters()),
        "peak_memory_bytes": peak_memory_bytes(device),
    }, comparison


def read(cache: RowCache, count: int) -> Tensor:
    """Codes int64 [count,N], as `ViewDataset` hands them over."""
    return torch.from_numpy(np.stack([cache.read(0, image) for image in range(count)]).astype(np.int64))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="python -m benchmarks.code_cache",
    )
    parser.add_argument("--tokenizers", nargs="+", default=TOKENIZERS, choices=TOKENIZERS)
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=DTYPES, help="of tokenizers")
    parser.add_argument("--variant", default="beit_b", help="of the network, such as beit_l")
    parser.add_argument("--batch", type=int, default=8, help="images of a step")
    parser.add_argument("--fill-batch", type=int, default=5, help="images of a batch of mpm tokenize")
    parser.add_argument("--rounds", type=int, default=5, help="of four turns, for each comparison")
    parser.add_argument("--steps", type=int, default=1, help="of a turn")
    parser.add_argument("--warmup", type=int, default=2, help="turns before the first round")
    parser.add_argument("--renderings", type=int, default=50, help="crops rendered for `loader`")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, help="file the JSON lines are appended to")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cpu":
        keep_freed_memory()

    words = [f"backbone.variant={arguments.variant}", "run.workers=0"]
    config = configfile.load(CONFIGS / "vitb_beit.yaml", words, PretrainConfig).config
    results = Results("code_cache", device, out=arguments.out, packages=["timm"])
    for name in arguments.tokenizers:
        for dtype in arguments.dtypes:
            record, comparison = measure(name, dtype, config, device, arguments)
            equal, loader = record["equal_codes"], record["loader"]
            results.add(
                {
                    "case": name,
                    "tokenizer_dtype": dtype,
                    "network": arguments.variant,
                    "network_dtype": config.optim.dtype,
                    "batch": arguments.batch,
                    "warmup_turns": arguments.warmup,
                    "steps_per_turn": arguments.steps,
                    **record,
                },
                f"{name} {dtype}, {arguments.variant} batch {arguments.batch}: computed "
                f"{statistics.median(comparison.theirs_s):.3g} s, cached "
                f"{statistics.median(comparison.ours_s):.3g} s, {comparison}; over given codes "
                f"{record['over_given']['ratio']['median']:.2f}x; codes equal {equal['step']:.2%}, alone "
                f"{equal['alone']:.2%}; a crop takes {1e3 * loader['with_target']:.1f} ms with the "
                f"tokenizer's view, {1e3 * loader['without_target']:.1f} without",
            )
    results.finish()


if __name__ == "__main__":
    main()
