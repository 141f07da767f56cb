"""How fast is one training step of MAE, forward + backward + AdamW, against lightly's?

    python -m benchmarks.step --out benchmarks/results/DATE_step.jsonl
    python -m benchmarks.step --whole-process --out benchmarks/results/DATE_step.jsonl
    python -m benchmarks.step --device cuda --batch 256 128 --steps 20 --compile

Both train MAE at 224 px with a decoder of 512 x 8 blocks x 16 heads, 75 % masked, on raw pixels (lightly's
example has no norm-pix). lightly's is built from its modules as its own example builds it:
MaskedVisionTransformerTIMM on timm's ViT, MaskedVisionTransformerDecoderTIMM, MSELoss, `AdamW(lr=1.5e-4)`;
the example's own sizes, which are said there not to be the paper's, are replaced. Ours is
`configs/vitb_mae.yaml` with the size and norm-pix changed, run by `train_steps`.

Cases:
    defaults         ours as configured: bf16 autocast, fused AdamW, tuned allocator, on CUDA compiled blocks;
                     lightly's as in its example: fp32, torch's default AdamW
    fp32             both fp32, fused AdamW, tuned allocator: equal precision
    bf16             the same under bf16 autocast
    bf16_explicit    CPU only: the same, and lightly's attention written out (timm's `set_fused_attn(False)`),
                     which is faster on CPUs without AMX: lightly at its best there
    bf16_compiled    with --compile: both at their best, and `torch.compile` for each block

Each contender is a process of its own that waits on a pipe while the other one is timed, so allocators,
threads and peak memory are separate; a tuned allocator is `keep_freed_memory`, for lightly's process too. A
step contains what the library's loop does, which is more for ours: it converts uint8, normalises, sorts the
mask and measures the gradient norm, while lightly's gets normalised floats and draws its mask.

How to read the answer: `ratio` is lightly's time / ours, per round A B B A; `mfu` is FLOP/s (3 x the
forward pass's matrix products, each library's own; lightly's counted by torch) over the ceiling, the FLOP/s
of a large square matrix product of the same type, measured before every round. `equality` compares the two
in fp32 with the same weights, images and mask: the losses, and the largest difference of a gradient over the
largest gradient of its parameter. lightly's class token has a fixed position of zeros where ours carries its
own, it computes patch embeddings of the whole image by a convolution, and the last decoder block for all
tokens: the results are the same.

`--whole-process` times five steps from the start of the interpreter to its end instead, imports and
building included, with the peak resident memory; the images are random numbers in memory and nothing is
saved, for both.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.measuring import Comparison, Results, interleaved, peak_memory_bytes, significant
from benchmarks.processes import StepProcess

CONFIG = Path(__file__).parents[1] / "configs/vitb_mae.yaml"
TIMM_NAMES = {
    "vit_s": "vit_small_patch16_224",
    "vit_b": "vit_base_patch16_224",
    "vit_l": "vit_large_patch16_224",
}
SIDE, GRID, NUM_MASKED = 224, (14, 14), 147
LR = 1.5e-4
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Contender(NamedTuple):
    library: str  # "mpm" or "lightly"
    dtype: str
    allocator: str  # "tuned": mpm's mallopt, which serves any program; "default": the C library's
    adamw: str  # "fused" or "default"
    attention: str  # "dispatched" by mpm; timm's "fused" (SDPA) or "explicit"
    compile: str | bool  # each block; "auto": on CUDA


def cases(device: torch.device, *, compiled: bool) -> dict[str, tuple[Contender, Contender]]:
    """Ours and theirs by name."""

    def best(dtype: str, attention: str, *, compile: bool = False) -> tuple[Contender, Contender]:
        return (
            Contender("mpm", dtype, "tuned", "fused", "dispatched", compile),
            Contender("lightly", dtype, "tuned", "fused", attention, compile),
        )

    on_cpu = device.type == "cpu"
    defaults = (
        Contender("mpm", "bf16", "tuned", "fused", "dispatched", "auto"),
        Contender("lightly", "fp32", "default", "default", "fused", False),
    )
    found = {"defaults": defaults, "fp32": best("fp32", "fused"), "bf16": best("bf16", "fused")}
    if on_cpu:
        found["bf16_explicit"] = best("bf16", "explicit")
    if compiled:
        found["bf16_compiled"] = best("bf16", "explicit" if on_cpu else "fused", compile=True)
    return found


class Batch(NamedTuple):
    images: Tensor  # uint8 [B,3,H,W]
    masked: Tensor  # bool [B,N]


def random_batch(count: int, *, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator)
    order = torch.rand(count, GRID[0] * GRID[1], generator=generator).argsort(1)
    return Batch(images, order < NUM_MASKED)


# mpm


def mpm_config(size: str, dtype: str) -> Any:
    from mpm import configfile
    from mpm.config import PretrainConfig

    overrides = [
        f"backbone.variant={size}",
        "objective.target.normalize_patches=false",
        f"optim.dtype={dtype}",
    ]
    return configfile.load(CONFIG, overrides, PretrainConfig).config


def mpm_objective(config: Any, device: torch.device) -> tuple[Any, Any]:
    """What is trained, and what prepares its inputs."""
    from mpm import build
    from mpm.objectives.prepare import PrepareMasked
    from mpm.patchify.pixels import IMAGENET, Normalize

    normalize = Normalize(*IMAGENET).to(device)
    target = build.target(config, normalize)
    prepare = PrepareMasked(target, normalize=normalize, num_masked=NUM_MASKED, device=device)
    return build.objective(config, target.out_dim).to(device), prepare


def mpm_step(contender: Contender, size: str, batch: Batch, device: torch.device) -> Callable[[], object]:
    from mpm import build
    from mpm.run import compile_blocks
    from mpm.training.loop import train_steps

    config = mpm_config(size, contender.dtype)
    objective, prepare = mpm_objective(config, device)
    compile_blocks(objective, contender.compile, device)
    reports = train_steps(
        objective,
        repeat(Batch(*(tensor.to(device) for tensor in batch))),
        prepare=prepare,
        optimizer=build.optimizer(config.optim, objective),
        lr_at=lambda step: LR,
        start=0,
        stop=10**9,
        dtype=build.dtype(config.optim),
    )
    return lambda: next(reports)


def mpm_gflop(size: str) -> float:
    """Of one image's training step, in matrix products."""
    from mpm.objectives.cost import masked_macs

    meta = torch.device("meta")
    with meta:
        objective, _ = mpm_objective(mpm_config(size, "fp32"), meta)
    return 3 * 2 * masked_macs(objective, num_masked=NUM_MASKED) / 1e9


# lightly


class LightlyMAE(nn.Module):
    """MAE from lightly's parts, put together as in https://docs.lightly.ai/examples/mae.html."""

    def __init__(self, size: str):
        from lightly.models.modules import MaskedVisionTransformerDecoderTIMM, MaskedVisionTransformerTIMM
        from timm.models import vision_transformer

        super().__init__()
        vit = getattr(vision_transformer, TIMM_NAMES[size])()
        num_patches, num_prefix = vit.patch_embed.num_patches, vit.num_prefix_tokens
        self.patch_size = vit.patch_embed.patch_size[0]
        self.backbone = MaskedVisionTransformerTIMM(vit=vit)
        self.decoder_embed = nn.Linear(vit.embed_dim, 512)
        self.decoder = MaskedVisionTransformerDecoderTIMM(
            num_patches=num_patches, embed_dim=512, depth=8, num_heads=16, num_prefix_tokens=num_prefix
        )
        self.prediction_head = nn.Linear(512, 3 * self.patch_size**2)

    def forward(self, images: Tensor, indices: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Images [B,3,H,W] -> predictions and targets [B,M,F]; `indices`: of kept and masked tokens."""
        from lightly.models import utils

        B, length = len(images), self.backbone.sequence_length
        if indices is None:
            indices = utils.random_token_mask(size=(B, length), mask_ratio=0.75, device=images.device)
        keep, masked = indices
        embedded = self.decoder_embed(self.backbone.encode(images=images, idx_keep=keep))
        x = utils.set_at_index(embedded.new_zeros(B, length, 512), keep, embedded)
        x = self.decoder(x, idx_mask=masked)  # puts the mask token at `masked`
        predictions = self.prediction_head(utils.get_at_index(x, masked))
        # token 0 is the class token
        return predictions, utils.get_at_index(utils.patchify(images, self.patch_size), masked - 1)


def normalized(images: Tensor) -> Tensor:
    """As lightly's MAETransform hands them over."""
    from lightly.transforms.utils import IMAGENET_NORMALIZE

    mean, std = (torch.tensor(IMAGENET_NORMALIZE[key]).reshape(3, 1, 1) for key in ("mean", "std"))
    return (images / 255 - mean) / std


def lightly_step(contender: Contender, size: str, batch: Batch, device: torch.device) -> Callable[[], object]:
    from timm.layers import set_fused_attn

    set_fused_attn(contender.attention == "fused")
    model = LightlyMAE(size).to(device)
    if contender.compile:
        from timm.models.vision_transformer import Block

        for block in model.modules():
            if isinstance(block, Block):
                block.compile()
    criterion = nn.MSELoss()
    fused = {"fused": True} if contender.adamw == "fused" else {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, **fused)
    images, dtype = normalized(batch.images).to(device), DTYPES[contender.dtype]

    def step() -> None:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = criterion(*model(images))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def lightly_gflop(size: str) -> float:
    from timm.layers import set_fused_attn
    from torch.utils.flop_counter import FlopCounterMode

    set_fused_attn(True)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        LightlyMAE(size)(torch.empty(1, 3, SIDE, SIDE))
    return 3 * counter.get_total_flops() / 1e9


# Equality


def equality(size: str) -> dict[str, float]:
    """Differences of the two in fp32 on the CPU, with the same weights, images and mask."""
    torch.manual_seed(0)
    device = torch.device("cpu")
    batch = random_batch(2)
    theirs = LightlyMAE(size)
    ours, prepare = mpm_objective(mpm_config(size, "fp32"), device)
    renamed = our_names(theirs.state_dict())
    tables = {name: tensor for name, tensor in ours.state_dict().items() if name.endswith("positions.table")}
    apart = max(float((renamed[name] - table).abs().max()) for name, table in tables.items())
    ours.load_state_dict(renamed)

    inputs = prepare(batch)
    our_loss = ours(inputs, torch.zeros(())).loss
    keep = torch.cat([torch.zeros(2, 1, dtype=torch.int64), inputs.mask.visible + 1], dim=1)
    their_loss = nn.functional.mse_loss(*theirs(normalized(batch.images), (keep, inputs.mask.masked + 1)))
    our_loss.backward()
    their_loss.backward()
    their_gradients = our_names({name: p.grad for name, p in theirs.named_parameters() if p.grad is not None})
    gradients = [
        float((p.grad - their_gradients[name]).abs().max() / their_gradients[name].abs().max())
        for name, p in ours.named_parameters()
    ]
    return {
        "loss_mpm": our_loss.item(),
        "loss_lightly": their_loss.item(),
        "loss_difference": abs(our_loss.item() - their_loss.item()),
        "gradient_difference": significant(max(gradients)),
        "gradients_compared": len(gradients),
        "position_table_difference": apart,
    }


def our_names(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """lightly's tensors under mpm's names; what only one of the two has is left out."""
    ours = {}
    for name, tensor in theirs.items():
        match name.removeprefix("backbone.vit.").split("."):
            case ["cls_token"]:
                ours["backbone.prefix_tokens"] = tensor[0]
            case ["pos_embed"]:
                ours["backbone.positions.table"] = tensor[0, 1:]  # row 0, the class token's, is zero
            case ["patch_embed", "proj", kind]:
                flat = tensor.permute(0, 2, 3, 1).flatten(1) if kind == "weight" else tensor
                ours[f"backbone.stem.proj.{kind}"] = flat
            case ["blocks", *rest]:
                ours[".".join(["backbone.blocks", *rest])] = tensor
            case ["norm", kind]:
                ours[f"predictor.norm.{kind}"] = tensor
            case ["decoder_embed", kind]:
                ours[f"predictor.embed.{kind}"] = tensor
            case ["prediction_head", kind]:
                ours[f"predictor.head.{kind}"] = tensor
            case ["decoder", "mask_token"]:
                ours["predictor.mask_token"] = tensor[0, 0]
            case ["decoder", "pos_embed"]:
                ours["predictor.positions.table"] = tensor[0, 1:]
            case ["decoder", "norm", kind]:
                ours[f"predictor.decoder_norm.{kind}"] = tensor
            case ["decoder", *rest]:
                ours[".".join(["predictor", *rest])] = tensor
    return ours


# Timing


def start(contender: Contender, size: str, count: int, device: torch.device) -> Callable[[], object]:
    """One training step as a function, with this process set up for it."""
    from mpm.training.allocator import keep_freed_memory

    if contender.allocator == "tuned" and device.type == "cpu":
        keep_freed_memory()
    torch.manual_seed(0)
    steps = {"mpm": mpm_step, "lightly": lightly_step}
    return steps[contender.library](contender, size, random_batch(count), device)


def compare(
    pair: tuple[Contender, Contender],
    size: str,
    count: int,
    device: torch.device,
    *,
    rounds: int,
    warmup: int,
    steps: int,
) -> tuple[dict[str, Any], Comparison]:
    from mpm.training.ceiling import matmul_flops_per_s

    ceilings: dict[str, list[float]] = {contender.dtype: [] for contender in pair}

    def measure_ceilings() -> None:
        for dtype, measured in ceilings.items():
            measured.append(matmul_flops_per_s(device, DTYPES[dtype]))

    with (
        StepProcess(start, pair[0], size, count, device) as ours,
        StepProcess(start, pair[1], size, count, device) as theirs,
    ):
        ours.run(warmup)
        theirs.run(warmup)
        comparison = interleaved(
            lambda: ours.run(steps), lambda: theirs.run(steps), rounds=rounds, before_round=measure_ceilings
        )
        peaks = {"mpm": ours.peak_memory_bytes(), "lightly": theirs.peak_memory_bytes()}
    ceiling = {dtype: statistics.median(measured) for dtype, measured in ceilings.items()}
    gflop = {"mpm": mpm_gflop(size), "lightly": lightly_gflop(size)}
    speed = {
        contender.library: count / statistics.median(seconds)
        for contender, seconds in zip(pair, comparison[:2], strict=True)
    }
    return {
        "images_per_s": {name: significant(value) for name, value in speed.items()},
        "gflop_per_image": {name: significant(value) for name, value in gflop.items()},
        "mfu": {
            contender.library: significant(
                speed[contender.library] * gflop[contender.library] * 1e9 / ceiling[contender.dtype]
            )
            for contender in pair
        },
        "ceiling_flops_per_s": {dtype: significant(value) for dtype, value in ceiling.items()},
        "peak_memory_bytes": peaks,
        "warmup_steps": warmup,
        "steps_per_turn": steps,
    }, comparison


# Whole processes

STEPS = 5


def five_steps(contender: Contender, size: str, count: int, device: torch.device) -> None:
    step = start(contender, size, count, device)
    for _ in range(STEPS):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    print(json.dumps(peak_memory_bytes(device)))


def compare_processes(
    pair: tuple[Contender, Contender], size: str, count: int, device: torch.device, *, rounds: int
) -> tuple[dict[str, Any], Comparison]:
    peaks: dict[str, list[int]] = {"mpm": [], "lightly": []}

    def run(contender: Contender) -> list[float]:
        arguments = [json.dumps(contender), "--sizes", size, "--batch", str(count), "--device", str(device)]
        begin = time.perf_counter()
        finished = subprocess.run(
            [sys.executable, "-m", "benchmarks.step", "--five-steps", *arguments],
            cwd=CONFIG.parents[1],
            env=os.environ | {"PYTHONWARNINGS": "ignore"},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        seconds = time.perf_counter() - begin
        peaks[contender.library].append(int(finished.stdout.splitlines()[-1]))
        return [seconds]

    for contender in pair:  # files into the page cache
        run(contender)
    comparison = interleaved(lambda: run(pair[0]), lambda: run(pair[1]), rounds=rounds)
    return {
        "steps": STEPS,
        "peak_memory_bytes": {name: int(statistics.median(values)) for name, values in peaks.items()},
    }, comparison


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="python -m benchmarks.step",
    )
    parser.add_argument("--sizes", nargs="+", default=["vit_s", "vit_b"], choices=TIMM_NAMES)
    parser.add_argument("--batch", nargs="+", type=int, default=[16, 8], help="images, one number a size")
    parser.add_argument("--cases", nargs="+", help="some of the cases above; all of them if left out")
    parser.add_argument("--compile", action="store_true", help="adds bf16_compiled")
    parser.add_argument("--rounds", type=int, default=5, help="of four turns")
    parser.add_argument("--steps", type=int, default=1, help="of a turn")
    parser.add_argument("--warmup", type=int, default=3, help="steps before the first round")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, help="file the JSON lines are appended to")
    parser.add_argument("--whole-process", action="store_true", help="of the case defaults, or of --cases")
    parser.add_argument("--five-steps", help=argparse.SUPPRESS)  # a process of --whole-process
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if arguments.five_steps:
        contender = Contender(*json.loads(arguments.five_steps))
        return five_steps(contender, arguments.sizes[0], arguments.batch[0], device)
    if len(arguments.batch) < len(arguments.sizes):
        parser.error(f"--batch needs {len(arguments.sizes)} numbers, one a size")

    known = cases(device, compiled=arguments.compile)
    chosen = arguments.cases or (["defaults"] if arguments.whole_process else list(known))
    if unknown := set(chosen) - set(known):
        parser.error(f"unknown cases {', '.join(sorted(unknown))}; use {', '.join(known)}")
    results = Results("step", device, out=arguments.out, packages=["lightly", "timm"])
    for size, count in zip(arguments.sizes, arguments.batch, strict=False):
        equal = equality(size)
        for case in chosen:
            pair = known[case]
            if arguments.whole_process:
                record, comparison = compare_processes(pair, size, count, device, rounds=arguments.rounds)
            else:
                record, comparison = compare(
                    pair,
                    size,
                    count,
                    device,
                    rounds=arguments.rounds,
                    warmup=arguments.warmup,
                    steps=arguments.steps,
                )
            name = f"{case}, whole process" if arguments.whole_process else case
            peak, mfu = record["peak_memory_bytes"], record.get("mfu")
            results.add(
                {
                    "case": name,
                    "size": size,
                    "batch": count,
                    "configuration": {contender.library: contender._asdict() for contender in pair},
                    **comparison.record("mpm", "lightly"),
                    **record,
                    "equality": equal,
                },
                f"{size} batch {count}, {name}: mpm {statistics.median(comparison.ours_s):.3g} s, lightly "
                f"{statistics.median(comparison.theirs_s):.3g} s, {comparison}"
                + (f"; MFU {mfu['mpm']:.2f} and {mfu['lightly']:.2f}" if mfu else "")
                + f"; peak {peak['mpm'] / 2**30:.2f} and {peak['lightly'] / 2**30:.2f} GiB"
                f"; losses differ by {equal['loss_difference']:.1g}",
            )
    results.finish()


if __name__ == "__main__":
    main()
