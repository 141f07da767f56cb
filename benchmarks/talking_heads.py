"""What do talking heads cost as one product over the heads, against Linear layers over a permuted axis?

    python -m benchmarks.talking_heads --out benchmarks/results/DATE_talking_heads.jsonl
    python -m benchmarks.talking_heads --device cuda --batch 64 --out benchmarks/results/DATE_...jsonl

`TalkingHeads` mixes the heads of the logits, and again those of the weights, by one `baddbmm` on [B,h,N*N]
each. The straightforward form moves the head axis to the end, applies `nn.Linear` and moves it back, as the
paper's code (CaiT, arXiv:2103.17239). Both get the same queries, keys and values, at the sizes of CaiT-S24:
8 heads of width 48, 196 tokens at 224 px (576 at 384 px: `--tokens 576`).

Cases:
    forward             under `inference_mode`
    forward+backward    down to queries, keys, values and mixings

Both run in one process, with the allocator that training uses. For bf16 the inputs are bf16, as the
projections before them give them, and the rest is autocast; both have their softmax in float32.

How to read the answer: `ratio` is the straightforward form's time / ours, per round A B B A; above 1, ours is
faster. `equality`, with the same weights and inputs, is the largest difference of an output over the largest
output, and the same of the gradients; those of the mixings are taken together, as softmax cancels the first
one's bias, whose gradient is zero but for rounding. In fp32, and in the dtype that is timed.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.measuring import Comparison, Results, interleaved, peak_memory_bytes, significant
from mpm.backbones.attention import TalkingHeads
from mpm.training.allocator import keep_freed_memory

HEADS, WIDTH = 8, 48
CASES = ("forward", "forward+backward")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class StraightforwardForm(nn.Module):
    """Two Linear layers over a permuted head axis: q, k, v [B,h,N,d] -> [B,h,N,d]."""

    def __init__(self, num_heads: int):
        super().__init__()
        self.proj_l = nn.Linear(num_heads, num_heads)
        self.proj_w = nn.Linear(num_heads, num_heads)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        logits = self.proj_l(logits.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        weights = self.proj_w(logits.softmax(-1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return weights @ v


def pair(device: torch.device) -> tuple[TalkingHeads, StraightforwardForm]:
    """Both forms with the same weights, near the identity as trained ones are."""
    torch.manual_seed(0)
    theirs = StraightforwardForm(HEADS)
    with torch.no_grad():
        for layer in (theirs.proj_l, theirs.proj_w):
            layer.weight.copy_(torch.eye(HEADS) + 0.2 * torch.randn(HEADS, HEADS))
    ours = TalkingHeads(HEADS)
    ours.load_state_dict(theirs.state_dict())
    return ours.to(device), theirs.to(device)


def random_inputs(batch: int, tokens: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """q, k and v that want gradients, and a gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    shape = batch, HEADS, tokens, WIDTH
    drawn = [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(4)]
    return [tensor.requires_grad_() for tensor in drawn[:3]] + drawn[3:]


def results_of(form: nn.Module, inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The output, and the gradients of q, k, v and of the mixings."""
    *qkv, gradient = inputs
    with torch.autocast(gradient.device.type, dtype=dtype, enabled=dtype != torch.float32):
        output = form(*qkv)
    gradients = torch.autograd.grad(output, [*qkv, *form.parameters()], gradient.to(output.dtype))
    return [output.detach(), *gradients]


def equality(batch: int, tokens: int, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Largest differences of the two forms, over the largest value."""
    inputs = random_inputs(batch, tokens, dtype, device)
    found, expected = (results_of(form, inputs, dtype) for form in pair(device))

    def difference(*indices: int) -> float:
        apart = max(float((found[i].float() - expected[i].float()).abs().max()) for i in indices)
        return apart / max(float(expected[i].abs().max()) for i in indices)

    q, k, v, *mixings = range(1, len(expected))
    return {
        "output_difference": significant(difference(0)),
        "gradient_difference": significant(
            max(difference(q), difference(k), difference(v), difference(*mixings))
        ),
    }


def passes(
    form: nn.Module, inputs: list[Tensor], dtype: torch.dtype, *, case: str, count: int
) -> Callable[[], list[float]]:
    """A turn of `count` passes."""
    device = inputs[0].device

    def forward() -> None:
        with torch.inference_mode(), torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            form(*inputs[:3])

    def turn() -> list[float]:
        seconds = []
        for _ in range(count):
            begin = time.perf_counter()
            if case == "forward":
                forward()
            else:
                results_of(form, inputs, dtype)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - begin)
        return seconds

    return turn


def compare(
    case: str, tokens: int, dtype: torch.dtype, device: torch.device, *, batch: int, rounds: int, count: int
) -> Comparison:
    inputs = random_inputs(batch, tokens, dtype, device)
    ours, theirs = (passes(form, inputs, dtype, case=case, count=count) for form in pair(device))
    for warm_up in (ours, theirs):
        warm_up()
    return interleaved(ours, theirs, rounds=rounds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="python -m benchmarks.talking_heads",
    )
    parser.add_argument("--tokens", nargs="+", type=int, default=[196])
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--cases", nargs="+", default=CASES, choices=CASES)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5, help="of four turns")
    parser.add_argument("--passes", type=int, default=10, help="of a turn")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, help="file the JSON lines are appended to")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cpu":
        keep_freed_memory()

    results = Results("talking_heads", device, out=arguments.out, packages=[])
    for tokens, name in itertools.product(arguments.tokens, arguments.dtypes):
        equal = {
            checked: equality(min(arguments.batch, 2), tokens, DTYPES[checked], device)
            for checked in dict.fromkeys(("fp32", name))
        }
        for case in arguments.cases:
            comparison = compare(
                case,
                tokens,
                DTYPES[name],
                device,
                batch=arguments.batch,
                rounds=arguments.rounds,
                count=arguments.passes,
            )
            results.add(
                {
                    "case": case,
                    "tokens": tokens,
                    "heads": HEADS,
                    "head_width": WIDTH,
                    "batch": arguments.batch,
                    "dtype": name,
                    "allocator": "tuned" if device.type == "cpu" else "default",
                    "passes_per_turn": arguments.passes,
                    **comparison.record("one_product", "straightforward"),
                    "peak_memory_bytes": peak_memory_bytes(device),  # of both together, so far
                    "equality": equal,
                },
                f"{tokens} tokens, {name}, {case}: one product "
                f"{statistics.median(comparison.ours_s) * 1e3:.3g} ms, straightforward "
                f"{statistics.median(comparison.theirs_s) * 1e3:.3g} ms, {comparison}"
                f"; fp32 outputs differ by {equal['fp32']['output_difference']:.1g}",
            )
    results.finish()


if __name__ == "__main__":
    main()
