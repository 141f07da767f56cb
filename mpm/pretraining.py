"""Pretraining, from a configuration to checkpoints: build, then one loop whose cadence is in plain sight."""

import logging

import torch

from mpm import build, distributed
from mpm.config import PretrainConfig, PretrainData, Statistics
from mpm.data.datasets import ImageSource
from mpm.monitoring import Monitor
from mpm.network import Trunk, read_trunk
from mpm.objectives.cost import masked_macs
from mpm.objectives.masked import MaskedPrediction
from mpm.objectives.prepare import PrepareMasked
from mpm.patchify.pixels import Normalize
from mpm.run import Run, compile_blocks, log_facts, parallel, seed_everything, started, write_picture
from mpm.training.ceiling import matmul_flops_per_s
from mpm.training.loop import StopRequest, train_steps
from mpm.training.reporting import Reporter

__all__ = ["pretrain"]

log = logging.getLogger(__name__)


def pretrain(config: PretrainConfig, *, stop_after: int | None = None) -> None:
    """Pretrain, or continue a run that was stopped.

    SIGTERM and SIGINT save a checkpoint and return.

    Args:
        config: as loaded from a file.
        stop_after: finished steps at which to save and return, before the end of the schedule (dry runs).

    Raises:
        ValueError: if what the configuration says does not fit the data or the machine.
        FloatingPointError: if the loss is not finite; the last checkpoint stays.
        OSError: if a checkpoint could not be written; the last one stays.
    """
    with started(config) as device, StopRequest() as stop:
        _pretrain(config, stop_after, device=device, stop=stop)


def _pretrain(
    config: PretrainConfig, stop_after: int | None, *, device: torch.device, stop: StopRequest
) -> None:
    data, optim, cadence = config.data, config.optim, config.run
    trunk = read_trunk(config.init.checkpoint) if config.init is not None else None
    backbone = config.backbone if trunk is None else config.backbone.over(trunk.backbone)
    config = config.model_copy(update={"backbone": backbone.in_full(classifier=False)})
    images = build.source(data, image_size=data.image_size, channels=data.channels, labelled=False)
    mean, std = build.statistics(*_moments(data, trunk), images)
    config = config.model_copy(update={"data": data.model_copy(update={"mean": mean, "std": std})})
    run = Run(config, "pretrain")

    seed_everything(config.seed)
    normalize = Normalize(mean, std).to(device)
    target = build.target(config, normalize)
    objective = build.objective(config, target.out_dim).to(device)
    if trunk is not None and run.resumes_from is None:
        _continue_from(trunk, objective, channels=data.channels)
    compile_blocks(objective, cadence.compile, device)
    trained = parallel(objective, device)
    seed_everything(config.seed + distributed.rank())

    schedule = build.Schedule(optim, len(images))
    last = min(schedule.steps, stop_after or schedule.steps)
    optimizer = build.optimizer(optim, objective)
    macs = masked_macs(objective, num_masked=config.num_masked)
    reporter = Reporter(
        run.folder,
        total_steps=schedule.steps,
        global_batch=optim.batch_size,
        flops_per_image=3 * 2 * macs,  # the backward pass costs two forward passes
        ceiling=matmul_flops_per_s(device, build.dtype(optim)),
    )
    known = {"images": len(images)}
    start, _ = run.restore(objective=objective, optimizer=optimizer, reporter=reporter, data=known)
    monitor = Monitor(config, images, target=target, normalize=normalize, device=device)
    log_facts(_facts(config, objective, schedule, macs=macs, images=images, device=device, start=start))

    view = build.pretrain_view(config)
    pin = device.type == "cuda"
    batches = build.training_loader(config, images, view, start=start, stop=last, pin_memory=pin)
    steps = train_steps(
        trained,
        batches,
        prepare=PrepareMasked(target, normalize=normalize, num_masked=config.num_masked, device=device),
        optimizer=optimizer,
        lr_at=schedule.lr_at,
        start=start,
        stop=last,
        accumulate=build.accumulation(config),
        clip_norm=optim.clip_norm,
        dtype=build.dtype(optim),
    )

    def save(step: int) -> None:
        reporter.check_finite(step)
        run.save(
            step,
            objective=objective,
            optimizer=optimizer,
            reporter=reporter,
            metadata={"data": known},
        )

    for report in steps:
        step = report.step
        reporter.add(report)
        stopping = distributed.any_rank(stop.requested)
        if stopping:  # before anything that takes long
            save(step)
        if step % cadence.log_every == 0 or step == last:
            reporter.log(step)
        if step % config.monitor.every == 0 or step == schedule.steps:
            reporter.check_finite(step)
            with reporter.paused():
                signals, picture = monitor.look(objective)
                reporter.scalars(step, signals, prefix="probe/")
                if picture is not None:
                    reporter.image("reconstructions", picture, step)
                    write_picture(run.folder / "reconstructions.png", picture)
        if step % cadence.save_every == 0 or step == last or stopping:
            save(step)  # where stopping, once more: with the window of the log as it now is
        if stopping:
            log.info("stopped at step %d on request; the same command continues", step)
            break
    reporter.close()


def _moments(data: PretrainData, trunk: Trunk | None) -> tuple[Statistics, Statistics]:
    """Means and deviations as stated, else the checkpoint's, else ImageNet's."""
    if data.mean is not None and data.std is not None:
        return data.mean, data.std
    if trunk is None:
        return data.mean or "imagenet", data.std or "imagenet"
    if trunk.channels != data.channels:
        raise ValueError(
            f"data.channels {data.channels} is not the checkpoint's {trunk.channels}; "
            f"give data.mean and data.std too: measured, or a list of {data.channels}"
        )
    return data.mean or trunk.mean, data.std or trunk.std


def _continue_from(trunk: Trunk, objective: MaskedPrediction, *, channels: int) -> None:
    """Load the backbone, and the predictor where it is the same; else the norm that read the trunk."""
    objective.backbone.load_state_dict(trunk.weights_for(objective.backbone, channels=channels))
    predictor = objective.get_submodule("predictor")
    # a fixed position table is of this run's grid, not a weight
    theirs = trunk.state["predictor"] | dict(predictor.named_buffers())
    own = predictor.state_dict()
    if {name: t.shape for name, t in own.items()} == {name: t.shape for name, t in theirs.items()}:
        predictor.load_state_dict(theirs)
        parts = "backbone and predictor"
    elif trunk.norm:
        predictor.get_submodule("norm").load_state_dict(trunk.norm)
        parts = "backbone and its norm; the predictor is another one and starts fresh"
    else:
        parts = "backbone; the predictor starts fresh"
    log.info("continuing from %s: %s", trunk.path, parts)


def _facts(
    config: PretrainConfig,
    objective: MaskedPrediction,
    schedule: build.Schedule,
    *,
    macs: int,
    images: ImageSource,
    device: torch.device,
    start: int,
) -> dict[str, str]:
    return {
        "parameters": build.parameters(objective),
        "forward": f"{macs / 1e9:.3g} GMACs an image",
        "masked": f"{config.num_masked} of {config.num_patches} patches",
        **build.facts(config, schedule, num_images=len(images), device=device, start=start),
    }
