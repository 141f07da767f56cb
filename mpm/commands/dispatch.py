"""What each command of the command line does with its options.

What can be told from words and configurations is told before torch is imported, here, inside the functions.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

from mpm import configfile
from mpm.commands.checkpoints import need_classes, tested
from mpm.config import FinetuneConfig, ImportedConfig, PretrainConfig, TokenizerConfig
from mpm.launch import is_first_process

__all__ = ["COMMANDS"]


def _pretrain(options: argparse.Namespace) -> None:
    model = configfile.pretraining_model_of(options.config, options.words)
    config = configfile.load(options.config, options.words, model).config
    from mpm.pretraining import pretrain

    _train(pretrain, config, dry_run=options.dry_run)


def _finetune(options: argparse.Namespace) -> None:
    if options.seeds or options.fractions:
        _finetune_several(options)
        return
    config = configfile.load(options.config, options.words, FinetuneConfig).config
    from mpm.finetuning import finetune

    _train(finetune, config, dry_run=options.dry_run)


def _finetune_several(options: argparse.Namespace) -> None:
    from mpm.commands.seeds import members, repeat

    runs = members(options.config, options.words, seeds=options.seeds, fractions=options.fractions)
    from mpm.finetuning import finetune

    if options.dry_run:
        _train(finetune, runs[0].config, dry_run=True)
        return
    folder = configfile.load(options.config, options.words, FinetuneConfig).config.run.output_dir
    results = repeat(finetune, runs, folder)
    if is_first_process() and results is not None:
        print(results)


def _train(
    train: Callable[..., object], config: PretrainConfig | TokenizerConfig | FinetuneConfig, *, dry_run: bool
) -> None:
    if not dry_run:
        train(config)
        return
    from mpm.commands.rehearsal import rehearse

    rehearse(train, config)
    if is_first_process():
        print(f"dry run: two steps, a save and a load went well; {config.run.output_dir} is as it was")


def _tokenize(options: argparse.Namespace) -> None:
    if configfile.pretraining_model_of(options.config, options.words) is TokenizerConfig:
        raise configfile.ConfigError(
            f"{options.config} trains a tokenizer; give the file of the pretraining that is to read its codes"
        )
    config = configfile.load(options.config, options.words, PretrainConfig).config
    from mpm.commands.tokenizing import tokenize

    print(tokenize(config))


def _teach(options: argparse.Namespace) -> None:
    config = configfile.load(options.config, options.words, FinetuneConfig).config
    from mpm.commands.teaching import teach

    print(teach(config))


def _predict(options: argparse.Namespace) -> None:
    need_classes(options.checkpoint)
    from mpm.commands.prediction import predict

    predict(
        options.checkpoint,
        options.words,
        output=options.output,
        device=options.device,
        workers=options.workers,
    )


def _evaluate(options: argparse.Namespace) -> None:
    checkpoints = [word for word in options.words if isinstance(word, Path)]
    if not checkpoints:
        raise ValueError("no checkpoint; name one or more before the values to replace")
    count = len(checkpoints) * len(options.image_sizes or [None]) * len(options.crops or [None])
    for option, given in (("-o", options.output), ("--mistakes", options.mistakes)):
        if given is not None and count > 1:
            raise ValueError(
                f"{option} draws one network at one size and crop; there are {count} combinations"
            )
    configs = tested(checkpoints, [word for word in options.words if not isinstance(word, Path)])
    from mpm.commands.evaluation import evaluate

    scores = evaluate(
        configs,
        image_sizes=options.image_sizes,
        crops=options.crops,
        real=options.real,
        picture=options.output,
        mistakes=options.mistakes,
        json=options.json,
    )
    if is_first_process():
        print(scores)


def _attention(options: argparse.Namespace) -> None:
    from mpm.commands.attention import draw_attention

    draw_attention(
        options.checkpoint,
        options.words,
        output=options.output,
        query=options.query,
        image_size=options.image_size,
        most=max(1, options.images),
        device=options.device,
    )


def _reconstruct(options: argparse.Namespace) -> None:
    model = configfile.model_of(options.checkpoint / "config.yaml")
    if model is ImportedConfig:
        raise ValueError(
            f"{options.checkpoint} is imported, and weights do not tell what was hidden and what predicted; "
            f"mpm pretrain --config FILE init.checkpoint={options.checkpoint} makes a run that knows"
        )
    if model is TokenizerConfig:
        raise ValueError(
            f"{options.checkpoint} is a tokenizer; its reconstructions are in its folder: reconstructions.png"
        )
    if model is not PretrainConfig:
        raise ValueError(
            f"{options.checkpoint} is no run of pretraining, so what predicted hidden patches is gone; "
            "give the pretraining run that it started from"
        )
    from mpm.commands.reconstruction import reconstruct

    reconstruct(
        options.checkpoint, options.words, output=options.output, seed=options.seed, device=options.device
    )


def _features(options: argparse.Namespace) -> None:
    from mpm.commands.features import write_features

    write_features(
        options.checkpoint,
        options.data,
        output=options.output,
        labelled=options.labels,
        device=options.device,
        workers=options.workers,
    )


def _probe(options: argparse.Namespace) -> None:
    from mpm.commands.probe_sources import probe_config

    config = probe_config(options.checkpoint, train=options.train, test=options.test, words=options.words)
    from mpm.commands.probe_report import draws_of
    from mpm.commands.probing import probe

    told = probe(
        options.checkpoint,
        config,
        draws=draws_of(options.labels, options.fractions, options.seeds),
        attentive=options.attentive,
        memory_gib=options.memory,
        as_json=options.json,
    )
    if told:
        print(told)


def _config(options: argparse.Namespace) -> None:
    model = configfile.model_of(options.config)
    print(configfile.explain(*configfile.load(options.config, options.words, model)))


def _stats(options: argparse.Namespace) -> None:
    if options.data.is_dir():
        if options.words:
            raise ValueError(f"{options.words[0]} changes a configuration, but {options.data} is a folder")
        from mpm.commands.survey import survey_folder

        print(survey_folder(options.data, channels=options.channels))
        return
    if options.channels:
        raise ValueError(
            f"--channels is for a folder; for {options.data} write data.channels={options.channels}"
        )
    model = configfile.model_of(options.data)
    if model is ImportedConfig:
        raise ValueError(f"{options.data} is of weights that others trained and names no training images")
    config = configfile.load(options.data, options.words, model).config
    assert not isinstance(config, ImportedConfig)
    from mpm.commands.survey import survey_config

    print(survey_config(config))


def _models(options: argparse.Namespace) -> None:
    patterns = [word for word in options.words if "=" not in word]
    values = [word for word in options.words if "=" in word]
    from mpm.commands.models import rows, table

    listed = [row for pattern in patterns or ["*"] for row in rows(pattern, values)]
    print(table(listed, as_json=options.json))


def _import(options: argparse.Namespace) -> None:
    from mpm.commands.importing import import_weights

    print(
        import_weights(
            options.source,
            options.output,
            heads=options.heads,
            decoder_heads=options.decoder_heads,
            image_size=options.image_size,
        )
    )


def _export(options: argparse.Namespace) -> None:
    from mpm.commands.exporting import export_checkpoint

    print(export_checkpoint(options.checkpoint, options.output, to=options.to))


COMMANDS = {
    "pretrain": _pretrain,
    "finetune": _finetune,
    "tokenize": _tokenize,
    "teach": _teach,
    "predict": _predict,
    "evaluate": _evaluate,
    "attention": _attention,
    "reconstruct": _reconstruct,
    "features": _features,
    "probe": _probe,
    "models": _models,
    "import": _import,
    "export": _export,
    "config": _config,
    "stats": _stats,
}
