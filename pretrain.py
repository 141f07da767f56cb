"""Pretrain a vision transformer on unlabelled images: torchrun pretrain.py --config configs/vitb_mae.yaml."""

from mpm.cli import main

if __name__ == "__main__":
    raise SystemExit(main(command="pretrain"))
