"""The runs whose first losses and gradient norms are kept in files beside this one."""

from pathlib import Path
from typing import NamedTuple

from mpm.finetuning import finetune
from mpm.pretraining import pretrain
from tests.integration.runs import metrics
from tests.integration.settings import (
    CONV,
    HMLP,
    SIMMIM,
    codes_of,
    finetune_config,
    pretrain_config,
    tokenizer_config,
)

STEPS = 5
PRETRAININGS = {
    "mae_linear": ["backbone.stem.kind=linear"],
    "simmim_hmlp": [*SIMMIM, HMLP % "layer"],
    "mae_conv": [CONV % "batch"],
    "maskfeat_linear": ["objective.predictor={kind: linear}", "objective.target={kind: hog}"],
}
NAMES = (*PRETRAININGS, "beit_hmlp", "finetune")
FOLDER = Path(__file__).parent


class Curve(NamedTuple):
    """One number a step."""

    loss: list[float]
    grad_norm: list[float]


def file_of(name: str) -> Path:
    return FOLDER / f"{name}.json"


def curve(name: str, folder: Path) -> Curve:
    """Of a run in `folder`, on this machine; "finetune" starts from what "mae_linear" leaves there."""
    if name == "finetune":
        if not (folder / "mae_linear").exists():
            curve("mae_linear", folder)
        init = f"init.checkpoint={folder / 'mae_linear'}"
        finetune(finetune_config(folder / name, init, f"optim.steps={STEPS}", "optim.warmup_steps=0"))
    elif name == "beit_hmlp":
        pretrain(tokenizer_config(folder / "kmeans", f"optim.steps={STEPS}"))
        words = [*codes_of(folder / "kmeans"), HMLP % "batch", "backbone.initialization=beit"]
        pretrain(pretrain_config(folder / name, *words, f"optim.steps={STEPS}", "optim.warmup_steps=0"))
    else:
        words = [*PRETRAININGS[name], f"optim.steps={STEPS}", "optim.warmup_steps=0"]
        pretrain(pretrain_config(folder / name, *words))
    steps = [record for record in metrics(folder / name) if "train/loss" in record]
    return Curve([step["train/loss"] for step in steps], [step["train/grad_norm"] for step in steps])
