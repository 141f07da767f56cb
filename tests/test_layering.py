"""The arrows of the architecture, read from the imports themselves, those inside functions too."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mpm"

# What each part of mpm may import of the others. All may import `distributed`, and parts of themselves.
ARROWS: dict[str, set[str]] = {
    "launch": set(),
    "distributed": {"launch"},
    "variants": set(),
    "config": {"launch", "variants"},
    "configfile": {"config", "variants"},
    "checkpoint": set(),
    "training": set(),
    "evaluation": set(),
    "patchify": set(),
    "data": {"patchify.masks"},
    "backbones": {"patchify", "variants"},
    "tokenizers": {"patchify", "backbones"},
    "objectives": {"variants", "patchify", "backbones", "tokenizers"},
    "interop": {"variants", "patchify", "backbones", "tokenizers", "objectives"},
}
SEE_EVERYTHING = {
    "build",
    "run",
    "network",
    "trunk",
    "partial",
    "imported",
    "monitoring",
    "pretraining",
    "experiment",
    "masked_pretraining",
    "tokenizer_training",
    "tokenization",
    "inheritance",
    "labelled",
    "heads",
    "scoring",
    "distillation",
    "finetuning",
    "commands",
    "cli",
    "__init__",
    "__main__",
}
BANNED_NAMES = {"utils", "util", "misc", "common", "helpers"}

MODULES = sorted(path.relative_to(ROOT) for path in PACKAGE.rglob("*.py"))


def _imports(path: Path) -> set[str]:
    """Dotted names a file imports; `from a import b` gives `a.b`, be it a module or a name in one."""
    package = path.parts[:-1]
    names = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            base += [node.module] if node.module else []
            names |= {".".join([*base, alias.name]) for alias in node.names}
    return names


def _part(path: Path) -> str:
    return path.parts[1].removesuffix(".py")


def _within(name: str, module: str) -> bool:
    return f"{name}.".startswith(f"{module}.")


@pytest.mark.parametrize("path", [path for path in MODULES if _part(path) not in SEE_EVERYTHING], ids=str)
def test_imports_follow_the_arrows(path: Path) -> None:
    part = _part(path)
    assert part in ARROWS, f"mpm/{part} is new: draw its arrows in {Path(__file__).name}"
    allowed = {f"mpm.{other}" for other in ARROWS[part] | {part, "distributed"}}
    wrong = {
        name
        for name in _imports(path)
        if _within(name, "mpm") and not any(_within(name, other) for other in allowed)
    }
    assert not wrong, f"{path} imports {sorted(wrong)}; mpm.{part} may import {sorted(allowed)} of mpm"


def test_the_arrows_have_no_circle() -> None:
    reached: dict[str, set[str]] = {}  # in the order of ARROWS, everything a part imports is above it
    for part, others in ARROWS.items():
        others = {other.partition(".")[0] for other in others}
        assert others <= reached.keys(), f"{part} imports {others - reached.keys()}, listed below it"
        reached[part] = others


def test_nobody_imports_scripts_or_tests() -> None:
    outside = ("pretrain", "finetune", "benchmarks", "scripts", "tests")
    names = {(path, name) for path in MODULES for name in _imports(path)}
    assert not {(path, name) for path, name in names if any(_within(name, other) for other in outside)}


def test_modules_are_named_after_concepts() -> None:
    folders = [ROOT / name for name in ("mpm", "tests", "benchmarks", "scripts")]
    python = [path.relative_to(ROOT) for folder in folders for path in folder.rglob("*.py")]
    assert not [path for path in python if BANNED_NAMES & {*path.parts, path.stem}]


def test_config_errors_need_no_torch() -> None:
    """A mistake in a config is told at once, not after torch has been loaded."""
    code = "import sys, mpm.config, mpm.configfile, mpm.variants; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
