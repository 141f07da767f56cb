"""Fine-tune a classifier: torchrun finetune.py --config configs/finetune/vitb_in1k.yaml init.checkpoint=X."""

from mpm.cli import main

if __name__ == "__main__":
    raise SystemExit(main(command="finetune"))
