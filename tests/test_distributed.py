"""Started by torchrun, this file is the program whose two processes check what they computed."""

import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import NamedTuple

import pytest
import timm
import torch
from torch import Tensor, nn

from mpm import checkpoint, distributed
from mpm.backbones.timm_classifier import TimmClassifier
from mpm.data.datasets import SyntheticImages
from mpm.objectives.supervised import Classification, cross_entropy
from mpm.patchify.pixels import Normalize, to_unit
from mpm.scoring import Scoring
from mpm.training.loop import StepReport, train_steps
from mpm.training.optimizer import create_adamw, parameter_groups
from mpm.training.reporting import Reporter
from tests.integration.settings import SCRATCH, finetune_config


def test_one_process_is_its_own_group() -> None:
    assert (distributed.rank(), distributed.world_size(), distributed.local_rank()) == (0, 1, 0)
    assert distributed.is_main()
    distributed.barrier()
    x = torch.randn(3, 2)
    for function in (distributed.sum_over_ranks, distributed.gather_rows):
        assert function(x).equal(x)
    assert distributed.sum_over_ranks(x) is not x
    assert distributed.any_rank(True)
    assert not distributed.any_rank(False)
    assert distributed.gather_objects("a") == ["a"]
    assert distributed.broadcast_object("a") == "a"


def test_the_sum_over_one_process_keeps_the_gradient() -> None:
    x = torch.randn(3, requires_grad=True)
    distributed.differentiable_sum(2 * x).sum().backward()
    assert x.grad is not None
    assert x.grad.equal(torch.full((3,), 2.0))


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"LOCAL_WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "none"}, None),
        ({"LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "none", "OMP_NUM_THREADS": "1"}, 4),
        ({"LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "none", "OMP_NUM_THREADS": "2"}, None),
        ({"LOCAL_WORLD_SIZE": "4", "OMP_NUM_THREADS": "1"}, None),
        ({"LOCAL_WORLD_SIZE": "4"}, 4),
        ({"LOCAL_WORLD_SIZE": "32"}, 1),
    ],
)
def test_the_cores_are_shared_out_unless_the_user_chose(
    environ: dict[str, str], expected: int | None
) -> None:
    assert distributed.threads_per_process(environ, 16) == expected


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ValueError, match=r"run.device 'gpu' is unknown; use auto, cpu or cuda"):
        distributed.start("gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_cuda_is_refused() -> None:
    with pytest.raises(ValueError, match=r"use run\.device=cpu"):
        distributed.start("cuda")


CLAIMS = ("collectives", "differentiable_sum", "training", "full_disk", "not_finite", "scoring")


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `<claim>.<rank>`: what went wrong, empty where nothing did."""
    folder = tmp_path_factory.mktemp("verdicts")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, "--module", "tests.test_distributed", str(folder)],
        cwd=Path(__file__).parents[1],
        env={name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.torchrun
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("claim", CLAIMS)
def test_two_processes(claim: str, rank: int, verdicts: Path) -> None:
    assert (verdicts / f"{claim}.{rank}").read_text() == ""


def collectives(run_dir: Path) -> None:
    rank = distributed.rank()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    assert torch.get_num_threads() == max(1, cores // 2)
    assert distributed.world_size() == 2
    assert distributed.sum_over_ranks(torch.tensor([rank, 1])).tolist() == [1, 2]
    assert [distributed.any_rank(rank in ranks) for ranks in ((), (0,), (1,), (0, 1))] == [
        False,
        True,
        True,
        True,
    ]
    assert distributed.gather_objects({"rank": rank}) == [{"rank": 0}, {"rank": 1}]
    assert distributed.broadcast_object(f"from {rank}") == "from 0"
    assert distributed.broadcast_object(f"from {rank}", src=1) == "from 1"
    for counts in ((3, 1), (0, 2), (2, 2), (0, 0)):
        everything = torch.arange(sum(counts) * 4).view(-1, 2, 2)
        for dtype in (torch.int64, torch.float32, torch.bfloat16, torch.bool):
            rows = everything.to(dtype)
            gathered = distributed.gather_rows(rows.split(list(counts))[rank])
            assert gathered.dtype == dtype
            assert gathered.equal(rows)


def differentiable_sum(run_dir: Path) -> None:
    def loss_of(rows: Tensor, total: Tensor, count: int) -> Tensor:
        mean = total / count
        return ((rows - mean).square() * rows).sum()

    torch.manual_seed(0)
    batch = torch.randn(8, 3, requires_grad=True)
    (expected,) = torch.autograd.grad(loss_of(batch, batch.sum(0), 8), batch)
    rows = batch.detach()[distributed.rank() :: 2].clone().requires_grad_()
    loss = loss_of(rows, distributed.differentiable_sum(rows.sum(0)), 8)
    loss.backward()
    torch.testing.assert_close(rows.grad, expected[distributed.rank() :: 2], rtol=1e-5, atol=1e-6)


class Batch(NamedTuple):
    images: Tensor


class Output(NamedTuple):
    loss: Tensor
    metrics: dict[str, Tensor]
    settings: dict[str, Tensor]


class Square(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, images: Tensor, progress: Tensor) -> Output:
        return Output(self.layer(images).square().mean(), {}, {})

    def after_step(self, step: int) -> None:
        pass


def training(run_dir: Path) -> None:
    torch.manual_seed(0)
    alone = Square()
    together = Square()
    together.load_state_dict(alone.state_dict())
    images = torch.rand(3, 8, 4)  # steps, global batch

    def steps_of(module: nn.Module, micro_batches: list[Tensor], accumulate: int) -> list[float]:
        groups = parameter_groups(module, lr=0.01, weight_decay=0.1)
        reports = train_steps(
            module,
            [Batch(rows) for rows in micro_batches],
            prepare=lambda batch: batch.images,
            optimizer=create_adamw(groups, lr=0.01, betas=(0.9, 0.95)),
            lr_at=lambda step: 0.01,
            start=0,
            stop=3,
            accumulate=accumulate,
            clip_norm=0.1,
        )
        return [float(report.grad_norm) for report in reports]

    expected = steps_of(alone, list(images), 1)
    share = images[:, distributed.rank() * 4 :][:, :4].reshape(6, 2, 4)
    wrapped = nn.parallel.DistributedDataParallel(together)
    reached = steps_of(wrapped, list(share), 2)
    torch.testing.assert_close(reached, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(together.state_dict(), alone.state_dict(), rtol=1e-5, atol=1e-6)


def full_disk(run_dir: Path) -> None:
    import resource

    options = {"config": {}, "metadata": {}, "model": {}, "keep": 2}
    checkpoint.save(run_dir, step=1, train_state={}, **options)
    if distributed.is_main():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    with pytest.raises(OSError, match="the last good checkpoint is step 1"):
        checkpoint.save(run_dir, step=2, train_state={"big": torch.zeros(100_000)}, **options)
    if distributed.is_main():
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    latest = checkpoint.latest(run_dir)
    assert latest is not None
    assert latest.name == "step_00000001"


def not_finite(run_dir: Path) -> None:
    reporter = Reporter(run_dir, total_steps=2, global_batch=2, progress_bar=False)
    one = torch.ones(())
    reporter.add(StepReport(1, 0.1, one * (1 + distributed.rank()), one, {}, 0.0, 1))
    assert reporter.check_finite(1)["loss"] == 1.5
    reporter.log(1)
    reporter.add(StepReport(2, 0.1, one / (1 - distributed.rank()), one, {}, 0.0, 1))
    with pytest.raises(FloatingPointError, match="in steps 2 to 2 on rank 1"):
        reporter.log(2)
    reporter.close()


def scoring(run_dir: Path) -> None:
    """Batch norm of timm has the statistics of its process, and a checkpoint those of the first."""
    config = finetune_config(run_dir, *SCRATCH)
    images = SyntheticImages(64, image_size=(32, 32), channels=3, num_classes=4)
    torch.manual_seed(0)
    network = TimmClassifier(timm.create_model("test_resnet", num_classes=4))
    norm = next(part for part in network.modules() if isinstance(part, nn.BatchNorm2d))
    norm.running_mean += 100 * distributed.rank()
    objective = Classification(network, loss=cross_entropy)
    normalize = Normalize((0.5,) * 3, (0.2,) * 3)
    scored = Scoring(config, normalize, torch.device("cpu")).accuracies(objective, None, images)["model"]
    assert not norm.running_mean.any()
    everything = torch.stack([images.read(index) for index in range(64)])
    predicted = network.eval().predict(normalize(to_unit(everything, torch.device("cpu")))).argmax(1)
    assert scored.confusion.sum(0).tolist() == predicted.bincount(minlength=4).tolist()


def main(folder: Path) -> None:
    distributed.start("cpu", timeout_s=30)
    for claim in CLAIMS:
        verdict = ""
        try:
            globals()[claim](folder / claim)
        except BaseException:
            verdict = traceback.format_exc()
        (folder / f"{claim}.{distributed.rank()}").write_text(verdict)
    distributed.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
