"""The fine-tuning recipes of the papers and of their released code, typed from those, not from our files.

A family holds what a released script does where nothing is said; a row adds what its command or table says.
Rates are absolute, each as base * batch / the batch that it is for. `OPEN` is what nobody states.
"""

from typing import Any

from tests.recipes import Constant, Cosine, Steps, Taught

__all__ = ["OPEN", "RECIPES"]

OPEN = object()

# torch.optim.AdamW's own, which are also the scripts' `--opt-eps 1e-8`; SimMIM's config.py has the same
ADAMW = {"kind": "adamw", "betas": (0.9, 0.999), "eps": 1e-8, "momentum": None, "nesterov": None}
# timm's create_optimizer: "sgd" is Nesterov's; deit/main.py: --momentum .9
SGD = {"kind": "sgd", "betas": None, "eps": None, "momentum": 0.9, "nesterov": True}
# apex's FusedLAMB clips at a norm of 1 by itself, and so does timm's; deit/main.py: --opt-eps 1e-8
LAMB = {
    "kind": "lamb",
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "momentum": None,
    "nesterov": None,
    "clip_norm": 1.0,
}

# timm's create_transform, which all of them call: scale, ratio and flip are its defaults, and RandAugment
# takes the place of the colour jitter. timm's Mixup: --mixup-prob 1, --mixup-switch-prob .5.
TIMM = {
    "image_size": (224, 224),
    "crop": "resized",
    "crop_scale": (0.08, 1.0),
    "crop_ratio": (3 / 4, 4 / 3),
    "flip": True,
    "interpolation": "bicubic",
    "color_jitter": 0.0,
    "rand_augment": "rand-m9-mstd0.5-inc1",
    "three_augment": False,
    "erasing": 0.25,
    "repeats": 1,
    "test_crop": 224 / 256,
    "mixup": 0.8,
    "cutmix": 1.0,
    "mixing": (1.0, 0.5),
    "label_smoothing": 0.1,
    "loss": "cross_entropy",
    "clip_norm": None,
    "head_init_std": 0.02,
    "head_norm": "none",
    "tune": "all",
    "eval_mode": False,
    "ema": None,
    "labels": None,
    "distillation": None,
}

# beit/run_class_finetuning.py (DistributedSampler: no repeats; --init_scale .001 of .02;
# utils.cosine_scheduler from 0 to --min_lr 1e-6) with the two commands from weights without labels in
# get_started_for_image_classification.md, whose rates are not scaled; linear drop path (modeling_finetune.py)
BEIT = TIMM | ADAMW | {
    "batch_size": 1024,
    "schedule": Cosine(0.0, 1e-6, "rest"),
    "weight_decay": 0.05,
    "drop_path_rule": "linear",
    "readout": "mean",
    "head_init_std": 0.02 * 0.001,
}  # fmt: skip
BEIT_B = BEIT | {"lr": 4e-3, "epochs": 100, "warmup_epochs": 20, "layer_decay": 0.65, "drop_path": 0.1}
BEIT_L = BEIT | {"lr": 1e-3, "epochs": 50, "warmup_epochs": 5, "layer_decay": 0.75, "drop_path": 0.2}

# mae/main_finetune.py (--warmup_epochs 5, --min_lr 1e-6, trunc_normal_(head, 2e-5), --global_pool) with the
# commands of FINETUNE.md: lr = blr * 1024 / 256
MAE = TIMM | ADAMW | {
    "batch_size": 1024,
    "warmup_epochs": 5,
    "schedule": Cosine(0.0, 1e-6, "rest"),
    "weight_decay": 0.05,
    "drop_path_rule": "linear",
    "readout": "mean",
    "head_init_std": 2e-5,
}  # fmt: skip

# SimMIM: config.py, configs/vit_base__800ep/simmim_finetune__vit_base__img224__800ep.yaml (batch 16 x 128),
# main_finetune.py (all three rates by batch / 512), models/vision_transformer.py (init_scale .001 of .02),
# lr_scheduler.py (timm's cosine)
SIMMIM = TIMM | ADAMW | {
    "batch_size": 2048,
    "lr": 1.25e-3 * 2048 / 512,
    "epochs": 100,
    "warmup_epochs": 20,
    "schedule": Cosine(2.5e-7 * 2048 / 512, 2.5e-7 * 2048 / 512, "run"),
    "weight_decay": 0.05,
    "layer_decay": 0.65,
    "clip_norm": 5.0,
    "drop_path": 0.1,
    "drop_path_rule": "linear",
    "readout": "mean",
    "head_init_std": 0.02 * 0.001,
}  # fmt: skip

# arXiv:2012.12877, table 9, which is deit/main.py's defaults: --lr 5e-4 for 512, --warmup-lr 1e-6, --min-lr
# 1e-5, --repeated-aug (3 of samplers.py). Its average (.99996) is never evaluated: ours has none.
DEIT = TIMM | ADAMW | {
    "batch_size": 1024,
    "lr": 5e-4 * 1024 / 512,
    "epochs": 300,
    "warmup_epochs": 5,
    "schedule": Cosine(1e-6, 1e-5, "run"),
    "weight_decay": 0.05,
    "layer_decay": 1.0,
    "drop_path": 0.1,
    "drop_path_rule": "linear",
    "readout": "token",
    "repeats": 3,
}  # fmt: skip
# section 4: both halves of the loss count the same; main.py's default teacher
HARD_BY_TOKEN = Taught("hard", "token", 0.5, "regnety_160.deit_in1k")
# README_deit.md, command at 384: 16 x 32, --lr 5e-6 --min-lr 5e-6 --weight-decay 1e-8 --epochs 30; main.py:
# --no-train-mode. Whole images at evaluation: how timm gets the paper's 83.1 (82.9 with .875).
DEIT_384 = DEIT | {
    "image_size": (384, 384),
    "batch_size": 512,
    "lr": 5e-6,
    "epochs": 30,
    "schedule": Constant(1e-6),
    "weight_decay": 1e-8,
    "eval_mode": True,
    "test_crop": 1.0,
}

# deit issue 104: DeiT's with 400 epochs; cait_models.py: the same drop path in every block, S24 .1;
# README_cait.md evaluates whole images. The published numbers are with and without a teacher.
CAIT = DEIT | {"epochs": 400, "drop_path_rule": "constant", "readout": "class_attention", "test_crop": 1.0}

# README_revenge.md: --ThreeAugment --color-jitter .3 --reprob 0 --weight-decay .05; models_v2.py: the same
# drop path in every block; rates not scaled (--unscale-lr); whole images at evaluation
DEIT3 = DEIT | LAMB | {
    "batch_size": 2048,
    "rand_augment": None,
    "three_augment": True,
    "color_jitter": 0.3,
    "erasing": 0.0,
    "drop_path_rule": "constant",
    "test_crop": 1.0,
}  # fmt: skip
# its commands on ImageNet-21k: --no-repeated-aug --mixup 0 --smoothing .1 --src, no --bce-loss
DEIT3_21K = DEIT3 | {"crop": "simple", "repeats": 1, "mixup": 0.0, "weight_decay": 0.02}

# deit issue 45 (CIFAR-10 and Cars): 768 images, SGD .01, 1e-4, 1000 epochs, no erasing, no stochastic depth;
# the rest is main.py's, rates as they are used (issue 141)
SMALL_SETS = DEIT | SGD | {
    "batch_size": 768,
    "lr": 0.01,
    "epochs": 1000,
    "weight_decay": 1e-4,
    "erasing": 0.0,
    "drop_path": 0.0,
}  # fmt: skip

RECIPES: dict[str, dict[str, Any]] = {
    "vitb_beit_in1k": BEIT_B,
    # README's drop path, .2; table 13 has .1
    "vitl_beit_in1k": BEIT_L,
    # arXiv:2106.08254, table 13, column CIFAR-100 (rates 2e-3 to 5e-3); its repeats are not in the code
    "vitb_beit_cifar100": BEIT_B
    | {"batch_size": 512, "lr": 3e-3, "epochs": 150, "weight_decay": 0.3, "erasing": 0.0},
    # beit2/get_started_for_image_classification.md, after 1600 epochs; other words than BEiT's below
    "vitb_beitv2_in1k": BEIT_B | {"lr": 5e-4, "layer_decay": 0.6, "drop_path": 0.2},
    "vitl_beitv2_in1k": BEIT_L | {"lr": 2e-4, "layer_decay": 0.8},
    # FINETUNE.md: --blr 5e-4 --layer_decay .65 --drop_path .1 --epochs 100
    "vitb_in1k": MAE | {"lr": 5e-4 * 1024 / 256, "layer_decay": 0.65, "drop_path": 0.1, "epochs": 100},
    # FINETUNE.md: --blr 1e-3 --layer_decay .75 --drop_path .2 --epochs 50
    "vitl_mae_in1k": MAE | {"lr": 1e-3 * 1024 / 256, "layer_decay": 0.75, "drop_path": 0.2, "epochs": 50},
    # arXiv:2111.06377, table 10; main_linprobe.py: LARS (util/lars.py, momentum .9), crop and flip alone,
    # class token, trunc_normal_(head, .01) behind a batch norm, plain cross entropy, --min_lr 0
    "vitb_mae_linear_in1k": TIMM
    | {
        "kind": "lars",
        "betas": None,
        "eps": None,
        "momentum": 0.9,
        "nesterov": None,
        "batch_size": 16384,
        "lr": 0.1 * 16384 / 256,
        "epochs": 90,
        "warmup_epochs": 10,
        "schedule": Cosine(0.0, 0.0, "rest"),
        "weight_decay": 0.0,
        "layer_decay": 1.0,
        "drop_path": 0.0,
        "drop_path_rule": OPEN,  # there is none
        "rand_augment": None,
        "erasing": 0.0,
        "mixup": None,
        "cutmix": None,
        "mixing": None,
        "label_smoothing": 0.0,
        "readout": "token",
        "head_init_std": 0.01,
        "head_norm": "batch",
        "tune": "head",
    },
    "vitb_simmim_in1k": SIMMIM,
    "deit_in1k": DEIT,
    "deit_distilled_in1k": DEIT | {"distillation": HARD_BY_TOKEN},
    "deit_384_in1k": DEIT_384,
    # arXiv:2012.12877, section 4: fine-tuned with the teacher, at the student's size
    "deit_distilled_384_in1k": DEIT_384 | {"distillation": HARD_BY_TOKEN},
    "cait_in1k": CAIT,
    # deit issue 108: 256 images, 5e-6, 60 epochs, --decay-epochs 10 --decay-rate .5, warm-up 5
    "cait_384_in1k": CAIT
    | {
        "image_size": (384, 384),
        "batch_size": 256,
        "lr": 5e-6,
        "epochs": 60,
        "schedule": Steps(1e-6, (10, 20, 30, 40, 50), 0.5),
    },
    # README_revenge.md: --lr 3e-3 --epochs 800 --input-size 192 --smoothing 0 --drop-path .2 --bce-loss
    "deit3_in1k": DEIT3
    | {
        "image_size": (192, 192),
        "lr": 3e-3,
        "epochs": 800,
        "drop_path": 0.2,
        "label_smoothing": 0.0,
        "loss": "binary_cross_entropy",
    },
    # --batch 64 x 8, --opt adamw --lr 1e-5 (which is --min-lr's default) --epochs 20 --weight-decay .1 --aa
    # rand-m9-mstd0.5-inc1 --reprob 0 --no-repeated-aug; drop path of B at 384 by the paper's appendix
    "deit3_384_in1k": DEIT
    | {
        "image_size": (384, 384),
        "batch_size": 512,
        "lr": 1e-5,
        "epochs": 20,
        "schedule": Constant(1e-6),
        "weight_decay": 0.1,
        "erasing": 0.0,
        "repeats": 1,
        "drop_path": 0.15,
        "drop_path_rule": "constant",
        "test_crop": 1.0,
    },
    # --lr .001 --epochs 240 --drop-path .1
    "deit3_in21k": DEIT3_21K | {"lr": 1e-3, "epochs": 240, "drop_path": 0.1},
    # --lr .0003 --epochs 50 --drop-path .15
    "deit3_in21k_to_in1k": DEIT3_21K | {"lr": 3e-4, "epochs": 50, "drop_path": 0.15},
    # arXiv:2203.09795, section 2.2: B 3e-3, drop path .1, 300 epochs, 2048 images, BCE, LAMB; the rest is
    # RSB-A2 (arXiv:2110.00476, table 2; mmpretrain's resnet50_8xb256-rsb-a2-300e_in1k.py: crops of 236 px)
    "three_things_in1k": DEIT
    | LAMB
    | {
        "batch_size": 2048,
        "lr": 3e-3,
        "weight_decay": 0.02,
        "rand_augment": "rand-m7-mstd0.5-inc1",
        "erasing": 0.0,
        "mixup": 0.1,
        "label_smoothing": 0.0,
        "loss": "binary_cross_entropy",
        "drop_path_rule": "constant",
        "test_crop": 0.95,
    },
    "cifar10": SMALL_SETS,
    "stanford_cars": SMALL_SETS,
    "flowers102": SMALL_SETS,  # nobody states one
    # dino issue 144: 5e-6, below --min-lr's default; issue 81: AdamW, 768 images, 1000 epochs, .05, repeats,
    # mixing, stochastic depth .1; no erasing as in deit issue 45
    "cifar100": DEIT
    | {"batch_size": 768, "lr": 5e-6, "epochs": 1000, "schedule": Constant(1e-6), "erasing": 0.0},
    # deit issue 105: 768 images, 7.5e-5, 360 epochs, erasing .1
    "inat18": DEIT | {"batch_size": 768, "lr": 7.5e-5, "epochs": 360, "erasing": 0.1},
}
