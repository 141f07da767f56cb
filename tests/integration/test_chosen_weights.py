"""Which of a run's weights the test images are seen with: the best step's, and the better of two sets."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mpm
from mpm import checkpoint
from mpm.data.datasets import SyntheticImages
from mpm.finetuning import finetune
from tests.integration.runs import metrics
from tests.integration.settings import SCRATCH, finetune_config

TEST = SyntheticImages(96, image_size=(32, 32), channels=3, num_classes=4, seed=1)
# a rate that rises until what was learned is lost again
RISING = [
    *(*SCRATCH, "data.test={kind: synthetic, count: 96, seed: 1}", "data.test_crop=1"),
    *("data.train.count=64", "mixup=null", "ema={decay: 0.9}", "evaluate_every=5", "optim.layer_decay=1"),
    *("optim.steps=25", "optim.warmup_steps=24", "optim.lr=0.5", "run.keep=5", "run.save_every=5"),
]


def top1(folder: Path, state: dict[str, Tensor]) -> float:
    """On the test images, as they are."""
    network = mpm.load(folder)
    network.classifier.load_state_dict({key.removeprefix("classifier."): t for key, t in state.items()})
    found = network.predict(torch.stack([TEST.read(number) for number in range(len(TEST))])).argmax(1)
    return (found == torch.tensor([TEST.label(number) for number in range(len(TEST))])).float().mean().item()


def result_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


@pytest.mark.slow
def test_the_test_looks_at_the_step_that_validation_chose(tmp_path: Path) -> None:
    """Which is not the last one here."""
    finetune(finetune_config(tmp_path, *RISING, "data.val={kind: synthetic, count: 64}"))
    scores = {
        (record["step"], weights): record[f"val/{weights}_top1"]
        for record in metrics(tmp_path)
        if "val/model_top1" in record
        for weights in ("model", "ema")
    }
    assert [step for step, weights in scores if weights == "ema"] == [5, 10, 15, 20, 25]
    step, weights = max(scores, key=lambda key: scores[key])  # the first of equals
    assert step < 25
    result = result_of(tmp_path)
    assert (result["step"], result["weights"]) == (step, weights)
    chosen, last = checkpoint.load(tmp_path), checkpoint.load(tmp_path / "checkpoints" / "step_00000025")
    assert (chosen.step, last.step) == (step, 25)
    assert chosen.metadata["best_step"] == step
    assert chosen.metadata["best_val"] == scores[step, weights]
    assert chosen.ema is not None
    found = {"model": top1(tmp_path, chosen.model), "ema": top1(tmp_path, chosen.ema)}
    assert result["top1_of_weights"] == pytest.approx(found)
    assert result["test"]["top1"] == pytest.approx(found[weights])
    states = {"model": last.model, "ema": last.ema or {}}
    assert found[weights] > top1(tmp_path, states[weights]) + 0.2  # the last step's are told apart


@pytest.mark.slow
@pytest.mark.parametrize(("val", "weights"), [("null", "ema"), ("{kind: synthetic, count: 64}", "model")])
def test_an_average_is_evaluated_beside_the_trained_weights(val: str, weights: str, tmp_path: Path) -> None:
    """One that hardly moves stays at the start: it is tested where there is no validation, only there."""
    words = ["ema={decay: 0.99999}", "optim.lr=3e-3", "optim.warmup_steps=0", f"data.val={val}"]
    finetune(finetune_config(tmp_path, *RISING, *words))
    saved, result = checkpoint.load(tmp_path), result_of(tmp_path)
    assert saved.ema is not None
    found = {"model": top1(tmp_path, saved.model), "ema": top1(tmp_path, saved.ema)}
    assert found["model"] > found["ema"] + 0.2
    assert result["top1_of_weights"] == pytest.approx(found)
    assert result["weights"] == saved.metadata["weights"] == weights
    assert result["test"]["top1"] == pytest.approx(found[weights])
    seen = [record["val/ema_top1"] for record in metrics(tmp_path) if "val/ema_top1" in record]
    assert len(seen) == (5 if val != "null" else 0)
    assert all(score < found["model"] - 0.2 for score in seen)
    own = mpm.load(tmp_path).classifier.state_dict()
    state = saved.ema if weights == "ema" else saved.model
    assert all(torch.equal(own[key.removeprefix("classifier.")], tensor) for key, tensor in state.items())
