"""Pretraining, from a configuration to checkpoints: build, then one loop whose cadence is in plain sight.

What is learned is an experiment: masked prediction (`masked_pretraining`) or a tokenizer
(`tokenizer_training`).
"""

import logging
from typing import Any

import torch

from mpm import build, distributed
from mpm.config import PretrainConfig, TokenizerConfig
from mpm.experiment import Experiment
from mpm.masked_pretraining import MaskedPretraining
from mpm.run import Run, compile_blocks, log_facts, parallel, seed_everything, started, write_picture
from mpm.tokenizer_training import TokenizerTraining
from mpm.training.ceiling import matmul_flops_per_s
from mpm.training.loop import StopRequest, train_steps
from mpm.training.reporting import Reporter

__all__ = ["pretrain"]

log = logging.getLogger(__name__)


def pretrain(config: PretrainConfig | TokenizerConfig, *, stop_after: int | None = None) -> None:
    """Pretrain a network or train a tokenizer, or continue a run that was stopped.

    SIGTERM and SIGINT save a checkpoint and return.

    Args:
        config: as loaded from a file.
        stop_after: finished steps at which to save and return, before the end of the schedule (dry runs).

    Raises:
        ValueError: if what the configuration says does not fit the data or the machine.
        FileNotFoundError: if a checkpoint or tokenizer that it names is not there.
        FloatingPointError: if the loss is not finite; the last checkpoint stays.
        OSError: if a checkpoint could not be written; the last one stays.
    """
    with started(config) as device, StopRequest() as stop:
        _pretrain(config, stop_after, device=device, stop=stop)


def _pretrain(
    config: PretrainConfig | TokenizerConfig,
    stop_after: int | None,
    *,
    device: torch.device,
    stop: StopRequest,
) -> None:
    experiment = _experiment(config)
    config, images = experiment.config, experiment.images
    optim, cadence = config.optim, config.run
    run = Run(config, experiment.kind)

    seed_everything(config.seed)
    parts = experiment.create(device, is_new=run.resumes_from is None)
    objective: Any = parts.objective
    compile_blocks(objective, cadence.compile, device)
    trained = parallel(objective, device)
    seed_everything(config.seed + distributed.rank())

    schedule = build.Schedule(optim, len(images))
    last = min(schedule.steps, stop_after or schedule.steps)
    optimizer = build.optimizer(optim, objective)
    reporter = Reporter(
        run.folder,
        total_steps=schedule.steps,
        global_batch=optim.batch_size,
        # the backward pass costs two forward passes
        flops_per_image=None if parts.macs is None else 3 * 2 * parts.macs,
        ceiling=None if parts.macs is None else matmul_flops_per_s(device, build.dtype(optim)),
    )
    known = {"images": len(images), **experiment.identity}
    start, _ = run.restore(objective=objective, optimizer=optimizer, reporter=reporter, data=known)
    facts = build.facts(config, schedule, num_images=len(images), device=device, start=start)
    log_facts(parts.facts | facts)

    pin = device.type == "cuda"
    batches = build.training_loader(
        config,
        images,
        parts.view,
        start=start,
        stop=last,
        pin_memory=pin,
        crops=parts.crops,
        cached=parts.codes,
    )
    steps = train_steps(
        trained,
        batches,
        prepare=parts.prepare,
        optimizer=optimizer,
        lr_at=schedule.lr_at,
        start=start,
        stop=last,
        total=schedule.steps,
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
        if step % cadence.log_every == 0 or step == last:
            reporter.log(step)
        if stopping:  # before a look, which may take longer than whoever stops the run will wait
            save(step)
        if step % config.monitor.every == 0 or step == schedule.steps:
            reporter.check_finite(step)
            with reporter.paused():
                look = parts.look()
                reporter.scalars(step, look.signals, prefix="probe/")
                if look.code_counts is not None:
                    reporter.code_histogram("codes", look.code_counts, step)
                if look.picture is not None:
                    reporter.image("reconstructions", look.picture, step)
                    write_picture(run.folder / "reconstructions.png", look.picture)
        if stopping:
            log.info("stopped at step %d on request; the same command continues", step)
            break
        if step % cadence.save_every == 0 or step == last:
            save(step)
    reporter.close()


def _experiment(config: PretrainConfig | TokenizerConfig) -> Experiment:
    if isinstance(config, TokenizerConfig):
        return TokenizerTraining(config)
    return MaskedPretraining(config)
