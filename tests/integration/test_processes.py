"""How a batch is spread (over processes, micro-batches, workers) does not change what is learned from it.

`main` below is what torchrun starts.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from mpm import build, cli, distributed, partial
from mpm.config import PretrainConfig
from mpm.finetuning import finetune
from mpm.objectives.masked import MaskedInputs
from mpm.objectives.prepare import PrepareMasked
from mpm.patchify.pixels import Normalize
from mpm.pretraining import pretrain
from mpm.training.loop import train_steps
from tests.integration.inputs import codes_in, inputs_of
from tests.integration.runs import ROOT, assert_identical, everything_saved, metrics
from tests.integration.settings import (
    CLASS_PRETRAINING,
    CONFIGS,
    CONV,
    DISTILLED,
    HMLP,
    QUICK,
    SCRATCH,
    SIMMIM,
    TOKENIZERS,
    codes_of,
    finetune_config,
    pretrain_config,
    tokenizer_config,
)

# Spreading a batch moves the last bits of its gradient. AdamW divides a gradient by its own size, so where it
# is nothing but rounding (a bias of the keys, which softmax cancels; one before a batch norm) it makes whole
# steps of that. With an eps of 1 it is nearly SGD with momentum. That also lets a gradient's size count:
# with a small eps, a sum in place of a mean would go unnoticed.
STEADY = ["optim.eps=1", "optim.lr=0.01", "optim.steps=6", "optim.warmup_steps=0"]
RTOL = 1e-5  # a hundred times float32's rounding: sums over 32 images in another order, six steps
# On one process torch's batch norm adds up the 8192 places of a batch one by one; on several, ours is nearer.
RTOL_OVER_PLACES = 1e-4

PRETRAININGS = {
    "mae, linear stem": [],
    "mae, hmlp stem": [HMLP % "layer"],
    "simmim, linear stem": SIMMIM,
    "mae, batch norm over visible patches": ["backbone.stem={kind: hmlp, norm: batch, statistics: visible}"],
    "simmim, batch norm over all patches": [
        *SIMMIM,
        "backbone.stem={kind: hmlp, norm: batch, statistics: all}",
    ],
    "simmim, conv stem with batch norm": [*SIMMIM, CONV % "batch"],
}
HOG = ["objective.predictor={kind: linear}", "objective.target={kind: hog}", "objective.loss=l2"]
# of codes they are given; those of a tokenizer's last bits may be others
CODES = {"beit": [HMLP % "batch"], "beitv2": CLASS_PRETRAINING}
TARGETS = {"maskfeat": HOG, "latent": ["objective.target={kind: latent, prototypes: 16}"]}
# Gumbel noise, mixing and dropped paths draw other numbers on each process; all else is the same.
FINETUNING = [*SCRATCH, *STEADY, "mixup=null", "optim.layer_decay=0.75", "evaluate_every=3"]
METHODS = {"mae": [], "simmim": SIMMIM}
TRUNKS = {
    "vit": [],
    "cait": ["backbone.attention=talking_heads", "backbone.class_token=false", "backbone.layer_scale=1e-5"],
    "parallel": ["backbone.branches=2"],
}
STEMS = {"linear": "backbone.stem.kind=linear", "hmlp": HMLP % "batch", "conv": CONV % "batch"}


OF_A_PART = ("train/perplexity", "train/codes_used")
# of a part, over a pretrained run with batch norm in its stem
TUNING = [*STEADY, "mixup=null", "evaluate_every=3", "data.image_size=40", "readout.kind=token"]
PARTS = {f"tuning of {part}": f"tune={part}" for part in ("attention", "norm", "head")}
NAMES = (*PRETRAININGS, *CODES, *TARGETS, *PARTS, "kmeans", "fine-tuning", "distillation")
# 65 test images and 61 for validation: neither two nor three processes divide them
UNEVEN = [
    "head_norm=batch",
    "optim.batch_size=30",
    "data.test.count=65",
    "data.train.count=245",
    "data.repeats=3",
]


def train(name: str, folder: Path, *words: str, given: Path | None = None) -> None:
    """`given`: a folder with a tokenizer and a pretrained run."""
    if name == "fine-tuning":
        finetune(finetune_config(folder, *FINETUNING, *words))
    elif name in PARTS:
        assert given is not None
        words = (f"init.checkpoint={given / 'pretrained'}", PARTS[name], *words)
        finetune(finetune_config(folder, *TUNING, *words))
    elif name == "distillation":
        finetune(finetune_config(folder, *FINETUNING, *DISTILLED, *words))
    elif name == "kmeans":
        pretrain(tokenizer_config(folder, "optim.steps=6", *words))
    elif name in CODES:
        assert given is not None
        words = (*codes_of(given / "tokenizer"), *CODES[name], *STEADY, "backbone.drop_path=0", *words)
        pretrain(pretrain_config(folder, *words))
    elif name in TARGETS:
        pretrain(pretrain_config(folder, *TARGETS[name], *STEADY, *words))
    else:
        # not l1, as in SimMIM: its gradient jumps where a prediction is right to the last bits
        pretrain(pretrain_config(folder, *PRETRAININGS[name], *STEADY, "objective.loss=l2", *words))


def assert_same_training(a: Path, b: Path, *, rtol: float = RTOL, but: str = "") -> None:
    """Weights, `but` one whose gradient is rounding alone, averages, and everything logged."""
    left, right = metrics(a), metrics(b)
    assert len(left) == len(right) >= 6
    for ours, theirs in zip(left, right, strict=True):
        # no probes: the spread of features that are almost alike is a small difference of large numbers;
        # the perplexity of a part of the batch is not that of the whole
        names = [name for name in ours if not name.startswith(("probe/", *OF_A_PART))]
        assert {name: ours[name] for name in names} == pytest.approx(
            {name: theirs[name] for name in names}, rel=rtol
        )
    left, right = partial.load(a), partial.load(b)
    for ours, theirs in ((left.model, right.model), (left.ema or {}, right.ema or {})):
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            if name == but:
                continue
            # a bias starts at 0 and some of its elements stay near it: relative to the largest
            atol = rtol * float(tensor.double().abs().max())
            torch.testing.assert_close(
                tensor, theirs[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
            )


def launch(what: str, folder: Path, *, processes: int) -> None:
    """Runs `main` under torchrun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [
            *launcher,
            f"--nproc-per-node={processes}",
            "-m",
            "tests.integration.test_processes",
            what,
            str(folder),
        ],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def on_two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run for each name, and `gradients`: one launch for all."""
    folder = tmp_path_factory.mktemp("two")
    train("kmeans", folder / "tokenizer")
    pretrain(pretrain_config(folder / "pretrained", HMLP % "batch", "optim.steps=2", "optim.warmup_steps=0"))
    launch("everything", folder, processes=2)
    return folder


@pytest.mark.torchrun
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_equal_one(name: str, on_two_processes: Path, tmp_path: Path) -> None:
    train(name, tmp_path, given=on_two_processes)
    rtol = RTOL_OVER_PLACES if "conv" in name else RTOL
    assert_same_training(on_two_processes / name, tmp_path, rtol=rtol)
    if name == "fine-tuning" or name in PARTS:
        ours, theirs = (
            json.loads((f / "result.json").read_text()) for f in (on_two_processes / name, tmp_path)
        )
        errors = [result["test"].pop("calibration_error") for result in (ours, theirs)]
        assert errors[0] == pytest.approx(errors[1], rel=0.01)  # of probabilities, which differ by rounding
        assert ours == theirs


def several_seeds(folder: Path) -> int:
    words = [*QUICK, *FINETUNING, f"run.output_dir={folder}"]
    config = CONFIGS / "finetune" / "debug.yaml"
    return cli.main(["finetune", "--config", str(config), "--seeds", "0", "1", "--fractions", "0.5", *words])


@pytest.mark.torchrun
def test_several_seeds_end_on_two_processes_as_on_one(on_two_processes: Path, tmp_path: Path) -> None:
    assert several_seeds(tmp_path) == 0
    ours, theirs = (
        json.loads((f / "seeds.json").read_text()) for f in (on_two_processes / "seeds", tmp_path)
    )
    assert ours["groups"] == theirs["groups"]
    assert len(ours["runs"]) == 2


@pytest.fixture(scope="module")
def on_one_two_and_three(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Runs of fine-tuning whose test set none of the numbers divides."""
    folder = tmp_path_factory.mktemp("uneven")
    train("fine-tuning", folder / "1", *UNEVEN)
    for processes in (2, 3):
        launch("uneven", folder / f"{processes}", processes=processes)
    return [folder / f"{processes}" for processes in (1, 2, 3)]


@pytest.mark.torchrun
@pytest.mark.parametrize("processes", [2, 3])
def test_accuracy_is_the_same_where_processes_do_not_divide_the_test_images(
    processes: int, on_one_two_and_three: list[Path]
) -> None:
    """Each image counts once: no share is padded, as the released code's are."""
    one, several = on_one_two_and_three[0], on_one_two_and_three[processes - 1]
    assert_same_training(one, several, but="classifier.readout.norm.bias")  # before a batch norm
    results = [json.loads((folder / "result.json").read_text()) for folder in (one, several)]
    assert results[0]["test"]["count"] == results[1]["test"]["count"] == 65
    calibration = [
        result["test"].pop("calibration_error") for result in results
    ]  # of probabilities, which round
    assert calibration[0] == pytest.approx(calibration[1], abs=1e-4)
    assert results[0] == results[1]
    assert [line.get("val/model_top1") for line in metrics(one)] == [
        line.get("val/model_top1") for line in metrics(several)
    ]


@pytest.mark.torchrun
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_codes_of_an_image_are_the_same_on_any_process(kind: str, on_two_processes: Path) -> None:
    """With its crop and its mask."""
    alone = inputs_of(pretrain_config(on_two_processes, *codes_of(on_two_processes / kind)))
    shares = [torch.load(on_two_processes / "inputs" / f"{kind} {rank}.pt") for rank in range(2)]
    for step, (index, inputs) in enumerate(alone.steps):
        both = {name: torch.cat([share[step][name] for share in shares]) for name in shares[0][step]}
        for name, whole in given(index, inputs).items():
            share = float((both[name] == whole).float().mean())
            # a convolution of 16 images may round as one of 32 does not
            assert share >= 0.999 if (kind, name) == ("dvae", "codes") else share == 1, name
    assert len(codes_in(alone).unique()) >= 4


@pytest.mark.torchrun
@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("trunk", TRUNKS)
@pytest.mark.parametrize("method", METHODS)
def test_every_parameter_has_a_gradient_under_ddp(
    method: str, trunk: str, stem: str, on_two_processes: Path
) -> None:
    """DDP refuses the second step where one has none: `find_unused_parameters` is off."""
    without = json.loads((on_two_processes / "gradients" / f"{method} {trunk} {stem}.json").read_text())
    assert without == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mae, hmlp stem", "fine-tuning"])
def test_four_micro_batches_equal_one_batch(name: str, tmp_path: Path) -> None:
    train(name, tmp_path / "whole")
    train(name, tmp_path / "parts", "run.micro_batch=8")
    assert_same_training(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
def test_two_workers_equal_none_bit_by_bit(tmp_path: Path) -> None:
    words = ["data.color_jitter=0.4", "backbone.drop_path=0.3", HMLP % "batch"]
    for workers in (0, 2):
        pretrain(pretrain_config(tmp_path / f"{workers}", *words, "optim.steps=10", f"run.workers={workers}"))
    assert metrics(tmp_path / "0") == metrics(tmp_path / "2")
    assert_identical(everything_saved(tmp_path / "0"), everything_saved(tmp_path / "2"))


@pytest.mark.slow
def test_two_workers_equal_none_bit_by_bit_in_fine_tuning(tmp_path: Path) -> None:
    words = [*SCRATCH, "data.rand_augment=rand-m9-mstd0.5-inc1", "data.erasing=0.5", "backbone.drop_path=0.3"]
    for workers in (0, 2):
        finetune(finetune_config(tmp_path / f"{workers}", *words, "optim.steps=10", f"run.workers={workers}"))
    assert metrics(tmp_path / "0") == metrics(tmp_path / "2")
    assert_identical(everything_saved(tmp_path / "0"), everything_saved(tmp_path / "2"))


def without_gradient(config: PretrainConfig) -> list[str]:
    """Names of the parameters that two steps under DDP leave without a gradient."""
    device = torch.device("cpu")
    data = config.data
    images = build.source(data, image_size=data.image_size, channels=data.channels, labelled=False)
    normalize = Normalize(*build.statistics("imagenet", "imagenet"))
    target = build.target(config, normalize)
    torch.manual_seed(0)
    objective = build.objective(config, target.out_dim)
    reached: set[str] = set()
    for name, parameter in objective.named_parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda p, n=name: reached.add(n) if p.grad.any() else None
        )
    view = build.pretrain_view(config)
    steps = train_steps(
        DistributedDataParallel(objective),
        build.training_loader(config, images, view, start=0, stop=2, pin_memory=False),
        prepare=PrepareMasked(target, normalize=normalize, num_masked=config.num_masked, device=device),
        optimizer=build.optimizer(config.optim, objective),
        lr_at=lambda step: 1e-3,
        start=0,
        stop=2,
    )
    assert len(list(steps)) == 2
    return sorted({name for name, _ in objective.named_parameters()} - reached)


def given(index: Tensor, inputs: MaskedInputs) -> dict[str, Tensor]:
    """To an objective, in a step."""
    return {"index": index, "images": inputs.images, "masked": inputs.mask.masked, "codes": inputs.targets}


def main(what: str, folder: Path) -> None:
    if what == "uneven":
        train("fine-tuning", folder, *UNEVEN)
        return
    for name in NAMES:
        train(name, folder / name, given=folder)
    assert several_seeds(folder / "seeds") == 0
    # their noise, and tokens half-way between two codes, differ; DDP asks for every gradient
    for name, words in {"dvae": [], "vqkd": ["optim.lr=1e-4"]}.items():  # higher, few codes stay in use
        pretrain(tokenizer_config(folder / name, *TOKENIZERS[name], *words, "optim.steps=3"))
    distributed.start("cpu", threads=1)
    (folder / "inputs").mkdir(exist_ok=True)
    for kind in TOKENIZERS:
        steps = inputs_of(pretrain_config(folder, *codes_of(folder / kind))).steps
        file = folder / "inputs" / f"{kind} {distributed.rank()}.pt"
        torch.save([given(*step) for step in steps], file)
    for method, method_words in METHODS.items():
        for trunk, trunk_words in TRUNKS.items():
            for stem, stem_word in STEMS.items():
                words = (*method_words, *trunk_words, stem_word)
                without = without_gradient(pretrain_config(folder, *words))
                if distributed.is_main():
                    (folder / "gradients").mkdir(exist_ok=True)
                    file = folder / "gradients" / f"{method} {trunk} {stem}.json"
                    file.write_text(json.dumps(without))
    distributed.stop()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
