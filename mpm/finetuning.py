"""Fine-tuning, from a configuration to a tested classifier: build, then one loop as in pretraining."""

import logging
from typing import Any

import torch

from mpm import build, distributed, partial
from mpm.backbones.classifier import Classifier
from mpm.backbones.cost import classifier_macs
from mpm.backbones.timm_classifier import TimmClassifier
from mpm.backbones.tuning import tune
from mpm.config import FinetuneConfig
from mpm.data.subsets import Subset
from mpm.distillation import open_answers, read_teacher
from mpm.inheritance import has_fresh_readout, inherit, recalibrate_stem, start_from, with_statistics
from mpm.labelled import open_labelled
from mpm.patchify.pixels import Normalize
from mpm.run import Run, compile_blocks, log_facts, parallel, seed_everything, started
from mpm.scoring import Scoring
from mpm.training.ceiling import matmul_flops_per_s
from mpm.training.ema import create_ema
from mpm.training.loop import StopRequest, train_steps
from mpm.training.reporting import Reporter
from mpm.trunk import read_start

__all__ = ["finetune"]

log = logging.getLogger(__name__)

_COMPARED = 1024  # validation images, at most, that tokens are compared on


def finetune(config: FinetuneConfig, *, stop_after: int | None = None) -> bool:
    """Train a classifier, or continue a run that was stopped; then look at the test images once.

    SIGTERM and SIGINT save a checkpoint and return. The run's folder gets `result.json` and `confusion.png`.

    Args:
        config: as loaded from a file.
        stop_after: finished steps at which to save and return, before the end of the schedule (dry runs).

    Returns: whether the run is finished and nobody asked to stop.

    Raises:
        ValueError: if what the configuration says does not fit the data, the checkpoint or the machine.
        FileNotFoundError: if there is no checkpoint to start from.
        FloatingPointError: if the loss is not finite; the last checkpoint stays.
        OSError: if a checkpoint could not be written; the last one stays.
    """
    with started(config) as device, StopRequest() as stop:
        return _finetune(config, stop_after, device=device, stop=stop)


def _finetune(
    config: FinetuneConfig, stop_after: int | None, *, device: torch.device, stop: StopRequest
) -> bool:
    trunk = read_start(config.init)
    config = inherit(config, trunk)
    if config.backbone is not None:
        config = config.model_copy(update={"backbone": config.backbone.in_full(classifier=True)})
    data = open_labelled(config)
    config, moments = with_statistics(config, data.train)
    taught = read_teacher(config, data.classes)
    answers = open_answers(config, taught, data.train)
    run = Run(config, "finetune")
    optim, cadence = config.optim, config.run

    seed_everything(config.seed)
    normalize = Normalize(*moments).to(device)
    network = _network(config, num_classes=len(data.classes)).to(device)
    if isinstance(network, Classifier):
        fresh = has_fresh_readout(trunk, config)
        tune(network, config.tune, readout_too=fresh, eval_mode=config.eval_mode)
    view = build.train_view(config.data, _image_size(config))
    if trunk is not None and isinstance(network, Classifier) and run.resumes_from is None:
        start_from(trunk, network, config, data.classes)
        if trunk.readout is None:  # a classifier's statistics are of whole images
            recalibrate_stem(network, data.train, config, normalize=normalize, device=device)
    objective = build.supervised(config, network)
    compile_blocks(objective, cadence.compile, device)
    trained = parallel(objective, device)
    seed_everything(config.seed + distributed.rank())
    ema = create_ema(objective, decay=config.ema.decay) if config.ema is not None else None

    schedule = build.Schedule(optim, len(data.train))
    last = min(schedule.steps, stop_after or schedule.steps)
    optimizer = build.optimizer(optim, objective)
    macs = classifier_macs(network) if isinstance(network, Classifier) else None
    reporter = Reporter(
        run.folder,
        total_steps=schedule.steps,
        global_batch=optim.batch_size,
        # where a part is frozen, less, by what it is
        flops_per_image=3 * 2 * macs if macs is not None and config.tune == "all" else None,
        ceiling=matmul_flops_per_s(device, build.dtype(optim)),
    )
    known: dict[str, Any] = {"images": len(data.train), "classes": list(data.classes)}
    if taught is not None:
        known[taught.key] = taught.identity
    start, metadata = run.restore(
        objective=objective, optimizer=optimizer, reporter=reporter, ema=ema, data=known
    )
    metadata = {"best_val": -1.0, "weights": "ema" if ema else "model"} | metadata
    metadata |= {"classes": list(data.classes), "data": known}
    if config.tune != "all" and trunk is not None and run.resumes_from is None:
        metadata["base"] = partial.describe_base(
            objective, trunk.weights, path=trunk.path, run_dir=run.folder
        )
    log_facts(
        {
            "parameters": build.parameters(network),
            **({} if macs is None else {"forward": f"{macs / 1e9:.3g} GMACs an image"}),
            "starts from": str(trunk.path) if trunk else "scratch",
            **({"saves": "what it trains; keep what it starts from"} if "base" in metadata else {}),
            **({} if taught is None else {"teacher": taught.told}),
            "classes": str(len(data.classes)),
            **build.facts(config, schedule, num_images=len(data.train), device=device, start=start),
        }
    )
    pin = device.type == "cuda"
    steps = train_steps(
        trained,
        build.training_loader(
            config,
            data.train,
            view,
            start=start,
            stop=last,
            pin_memory=pin,
            crops=config.distillation.crops if config.distillation is not None else None,
            cached=answers,
        ),
        prepare=build.prepare_labelled(
            config,
            normalize=normalize,
            num_classes=len(data.classes),
            device=device,
            teacher=None if taught is None or answers is not None else taught.teacher.to(device),
        ),
        optimizer=optimizer,
        lr_at=schedule.lr_at,
        start=start,
        stop=last,
        total=schedule.steps,
        accumulate=build.accumulation(config),
        clip_norm=optim.clip_norm,
        dtype=build.dtype(optim),
        ema=ema,
    )
    scoring = Scoring(config, normalize, device)
    evaluate_every = config.evaluate_every or schedule.per_epoch
    stopping = False

    def save(step: int, *, best: bool = False) -> None:
        reporter.check_finite(step)
        run.save(
            step,
            objective=objective,
            optimizer=optimizer,
            reporter=reporter,
            ema=ema,
            metadata=metadata,
            best=best,
        )

    for report in steps:
        step = report.step
        reporter.add(report)
        stopping = distributed.any_rank(stop.requested)
        if step % cadence.log_every == 0 or step == last:
            reporter.log(step)
        if stopping:  # before an evaluation, which may take longer than whoever stops the run will wait
            save(step)
        best = False
        is_time = step % evaluate_every == 0 or step == schedule.steps
        if data.val is not None and is_time:
            reporter.check_finite(step)
            with reporter.paused():
                scores = scoring.accuracies(objective, ema, data.val)
                numbers = {f"{name}_top1": s.top1 for name, s in scores.items()}
                some = Subset(data.val, range(0, len(data.val), -(-len(data.val) // _COMPARED)))
                heads = scoring.heads(objective, some)
                if heads is not None:
                    numbers |= {f"cosine_{place}": value for place, value in heads.cosine.items()}
                reporter.scalars(step, numbers, prefix="val/")
                weights = max(scores, key=lambda name: scores[name].top1)
                best = scores[weights].top1 > metadata["best_val"]
                if best:
                    metadata |= {"best_val": scores[weights].top1, "best_step": step, "weights": weights}
                each = ", ".join(f"{name} weights {s.top1:.2%}" for name, s in scores.items())
                log.info("step %d: validation top-1 of %s%s", step, each, ", the best so far" if best else "")
        if best or (not stopping and (step % cadence.save_every == 0 or step == last)):
            save(step, best=best)
        if stopping:
            log.info("stopped at step %d on request; the same command continues", step)
            break
    is_done = not stopping and last == schedule.steps
    if is_done and data.test is not None and not run.has("result.json"):
        scoring.test(run, objective, ema, data)
    reporter.close()
    return is_done and not distributed.any_rank(stop.requested)


def _network(config: FinetuneConfig, num_classes: int) -> Classifier | TimmClassifier:
    channels = config.data.channels
    assert channels is not None
    if config.network is not None:
        std = config.head_init_std
        return build.timm_classifier(
            config.network,
            image_size=_image_size(config),
            channels=channels,
            num_classes=num_classes,
            head_std=std,
        )
    assert config.backbone is not None
    return build.classifier(
        config,
        config.backbone,
        image_size=_image_size(config),
        channels=channels,
        num_classes=num_classes,
    )


def _image_size(config: FinetuneConfig) -> tuple[int, int]:
    assert config.data.image_size is not None
    return config.data.image_size
