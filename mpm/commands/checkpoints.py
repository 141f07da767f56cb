"""What a command needs of its checkpoints, told from their files before torch is loaded."""

from collections.abc import Sequence
from pathlib import Path

from mpm import configfile
from mpm.config import FinetuneConfig, ImportedConfig, PretrainConfig, TokenizerConfig

__all__ = ["FREE_TO_CHANGE", "need_classes", "tested"]

FREE_TO_CHANGE = ("run", "data.test", "data.test_crop", "data.interpolation")  # when evaluating


def need_classes(checkpoint: Path) -> None:
    """Refuse what knows no classes.

    Raises:
        ValueError: if it is a tokenizer, or of pretraining.
    """
    file = checkpoint / "config.yaml"
    model = configfile.model_of(file)
    if model is TokenizerConfig:
        raise ValueError(f"{checkpoint} is a tokenizer, not a network, and knows no classes")
    if model is ImportedConfig:
        config = configfile.load(file, [], ImportedConfig).config
        is_pretrained = config.readout is None or config.num_classes is None
    else:
        is_pretrained = model is PretrainConfig
    if is_pretrained:
        raise ValueError(
            f"{checkpoint} is of pretraining and knows no classes; fine-tune it first: "
            f"mpm finetune --config FILE init.checkpoint={checkpoint}"
        )


def tested(
    checkpoints: Sequence[Path], words: Sequence[str]
) -> list[tuple[Path, FinetuneConfig | ImportedConfig]]:
    """Checkpoints with their configurations, which name the same test images.

    Args:
        checkpoints: of fine-tuning, or imported classifiers.
        words: `key=value` that replace what each of them says, as far as that can be changed.

    Raises:
        ValueError: if a word changes anything else, or one has no test images, or another's.
    """
    for word in words:
        key = word.partition("=")[0]
        if not any(f"{key}.".startswith(f"{free}.") for free in FREE_TO_CHANGE):
            free = ", ".join(FREE_TO_CHANGE)
            raise ValueError(f"override {word}: the network is what it is; only {free} can be changed")
    found: list[tuple[Path, FinetuneConfig | ImportedConfig]] = []
    for checkpoint in checkpoints:
        need_classes(checkpoint)
        file = checkpoint / "config.yaml"
        config = configfile.load(file, words, configfile.model_of(file)).config
        assert isinstance(config, FinetuneConfig | ImportedConfig)
        if config.data.test is None:
            raise ValueError(
                f"{checkpoint} names no test images; "
                "add data.test.kind=folder data.test.root=FOLDER, with one folder a class"
            )
        if found and config.data.test != found[0][1].data.test:
            raise ValueError(
                f"{checkpoint} names other test images than {found[0][0]}; name those to compare on, as "
                "data.test.kind=folder data.test.root=FOLDER"
            )
        found.append((checkpoint, config))
    return found
