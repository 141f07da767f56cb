"""What does the hMLP stem cost as matrix products on visible patches, against its published convolutions?

    python -m benchmarks.stem --out benchmarks/results/DATE_stem.jsonl

Forward and backward of `HierarchicalMLPStem` with a mask, against the same network as three convolutions
(kernel = stride = 4, 2, 2; arXiv:2203.09795) over the whole image, whose tokens are gathered afterwards;
224 px, patch 16. The convolutional form runs in both memory formats, `contiguous` (torch's default) and
`channels_last`. Both run in one process, with the allocator that training uses.

Norms:
    layer            layer norm over channels: the two are equal in train mode
    batch_all        batch norm over all patches, equal in train mode too: ours then computes all patches
    batch_visible    batch norm over visible patches: ours is blind and faster; its training statistics differ
                     from the convolutions' by intent, so equality is checked in eval mode

How to read the answer: `ratio` is the convolutions' time / ours, per round A B B A; above 1, ours is
faster. `equality`, always in fp32 with the same weights, images and mask, is the largest difference of a
token's channels (their deviation is about 1), and the largest difference of a weight's gradient over the
largest gradient of that weight.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measuring import Comparison, Results, interleaved, peak_memory_bytes, significant
from mpm.patchify.masks import PatchMask
from mpm.patchify.stems import HierarchicalMLPStem
from mpm.training.allocator import keep_freed_memory

SIDE, PATCH, NUM_PATCHES = 224, 16, 196
NORMS = ("layer", "batch_all", "batch_visible")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class ConvolutionalForm(nn.Module):
    """The hMLP stem as published: images [B,3,H,W] -> tokens [B,K,D] of the visible patches."""

    def __init__(self, dim: int, norm: str):
        from timm.layers import LayerNorm2d

        super().__init__()
        narrow = dim // 4
        shapes = [(3, narrow, 4), (narrow, narrow, 2), (narrow, dim, 2)]
        self.convs = nn.ModuleList(nn.Conv2d(i, o, side, stride=side) for i, o, side in shapes)
        self.norms = nn.ModuleList(
            LayerNorm2d(o, eps=1e-6) if norm == "layer" else nn.BatchNorm2d(o) for _, o, _ in shapes
        )

    def forward(self, images: Tensor, mask: PatchMask) -> Tensor:
        x = images
        for step, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = norm(conv(x if step == 0 else nn.functional.gelu(x)))
        return mask.take_visible(x.flatten(2).transpose(1, 2))


def matmul_form(conv_form: ConvolutionalForm, dim: int, norm: str) -> HierarchicalMLPStem:
    """mpm's stem with the same weights."""
    kind, _, statistics = norm.partition("_")
    stem = HierarchicalMLPStem((PATCH, PATCH), dim, norm=kind, statistics=statistics or "all")
    state = {
        name.replace("convs", "projs"): tensor.permute(0, 2, 3, 1).flatten(1) if tensor.ndim == 4 else tensor
        for name, tensor in conv_form.state_dict().items()
    }
    stem.load_state_dict(state)
    return stem


def random_inputs(batch: int, ratio: float, device: torch.device) -> tuple[Tensor, PatchMask]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, SIDE, SIDE, generator=generator).to(device)
    count = round(ratio * NUM_PATCHES)
    masked = torch.rand(batch, NUM_PATCHES, generator=generator).argsort(1) < count
    return images, PatchMask.from_bool(masked.to(device), count)


def equality(dim: int, norm: str, ratio: float) -> dict[str, Any]:
    """Differences of the two forms in fp32 on the CPU, with the same weights, images and mask."""
    torch.manual_seed(0)
    images, mask = random_inputs(4, ratio, torch.device("cpu"))
    conv_form = ConvolutionalForm(dim, norm)
    if norm == "batch_visible":
        conv_form(images, mask)  # gives it running statistics
        conv_form.eval()
    stem = matmul_form(conv_form, dim, norm).train(conv_form.training)
    theirs, ours = conv_form(images, mask), stem(images, mask)
    gradient = torch.randn(theirs.shape)
    theirs.backward(gradient)
    ours.backward(gradient)
    apart = []
    for conv, proj in zip(conv_form.convs, stem.projs, strict=True):
        expected = conv.weight.grad.permute(0, 2, 3, 1).flatten(1)
        apart.append(float((expected - proj.weight.grad).abs().max() / expected.abs().max()))
    return {
        "mode": "train" if stem.training else "eval",
        "output_difference": significant(float((theirs - ours).detach().abs().max())),
        "gradient_difference": significant(max(apart)),
    }


def passes(
    stem: nn.Module, images: Tensor, mask: PatchMask, dtype: torch.dtype, *, count: int
) -> Callable[[], list[float]]:
    """A turn of `count` forward and backward passes."""
    device = images.device
    gradient = torch.randn(*mask.visible.shape, stem(images, mask).shape[-1], device=device)

    def turn() -> list[float]:
        seconds = []
        for _ in range(count):
            begin = time.perf_counter()
            with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                tokens = stem(images, mask)
            tokens.backward(gradient.to(tokens.dtype))
            stem.zero_grad(set_to_none=True)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - begin)
        return seconds

    return turn


def compare(
    dim: int,
    norm: str,
    ratio: float,
    memory_format: str,
    *,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    rounds: int,
    count: int,
) -> Comparison:
    images, mask = random_inputs(batch, ratio, device)
    conv_form = ConvolutionalForm(dim, norm).to(device)
    stem = matmul_form(conv_form, dim, norm).to(device)
    their_images = images
    if memory_format == "channels_last":
        conv_form = conv_form.to(memory_format=torch.channels_last)
        their_images = images.contiguous(memory_format=torch.channels_last)
    ours = passes(stem, images, mask, dtype, count=count)
    theirs = passes(conv_form, their_images, mask, dtype, count=count)
    for warm_up in (ours, theirs):
        warm_up()
    return interleaved(ours, theirs, rounds=rounds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="python -m benchmarks.stem",
    )
    parser.add_argument("--dims", nargs="+", type=int, default=[384, 768])
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.75, 0.4], help="shares masked")
    parser.add_argument("--norms", nargs="+", default=NORMS, choices=NORMS)
    parser.add_argument(
        "--memory-formats", nargs="+", default=["contiguous", "channels_last"], help="of the convolutions"
    )
    parser.add_argument("--dtype", default="fp32", choices=DTYPES)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5, help="of four turns")
    parser.add_argument("--passes", type=int, default=3, help="of a turn")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, help="file the JSON lines are appended to")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cpu":
        keep_freed_memory()

    results = Results("stem", device, out=arguments.out, packages=["timm"])
    for dim, ratio, norm in itertools.product(arguments.dims, arguments.ratios, arguments.norms):
        equal = equality(dim, norm, ratio)
        for memory_format in arguments.memory_formats:
            comparison = compare(
                dim,
                norm,
                ratio,
                memory_format,
                batch=arguments.batch,
                dtype=DTYPES[arguments.dtype],
                device=device,
                rounds=arguments.rounds,
                count=arguments.passes,
            )
            results.add(
                {
                    "case": f"{norm}, {memory_format}",
                    "dim": dim,
                    "masked": ratio,
                    "batch": arguments.batch,
                    "dtype": arguments.dtype,
                    "allocator": "tuned" if device.type == "cpu" else "default",
                    "passes_per_turn": arguments.passes,
                    **comparison.record("matmuls", "convolutions"),
                    "peak_memory_bytes": peak_memory_bytes(device),  # of both together, so far
                    "equality": equal,
                },
                f"dim {dim}, {ratio:.0%} masked, {norm}, convolutions {memory_format}: matmuls "
                f"{statistics.median(comparison.ours_s) * 1e3:.3g} ms, convolutions "
                f"{statistics.median(comparison.theirs_s) * 1e3:.3g} ms, {comparison}"
                f"; {equal['mode']} outputs differ by {equal['output_difference']:.1g}",
            )
    results.finish()


if __name__ == "__main__":
    main()
