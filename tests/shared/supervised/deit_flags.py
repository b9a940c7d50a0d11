"""The defaults of DeiT's script, which later recipes took over."""

import argparse

from tests.command_lines import assert_values_arrive

GIVEN = (
    "--batch-size 64 --drop 0 --drop-path 0.1 --model-ema --model-ema-decay 0.99996 --opt adamw --opt-eps 1e-8 "
    "--momentum 0.9 --weight-decay 0.05 --sched cosine --lr 5e-4 --lr-noise-pct 0.67 --lr-noise-std 1 --warmup-lr 1e-6 "
    "--min-lr 1e-5 --decay-epochs 30 --warmup-epochs 5 --cooldown-epochs 10 --patience-epochs 10 --decay-rate 0.1 "
    "--aa rand-m9-mstd0.5-inc1 --smoothing 0.1 --train-interpolation bicubic --repeated-aug --reprob 0.25 "
    "--remode pixel --recount 1 --mixup 0.8 --cutmix 1 --mixup-prob 1 --mixup-switch-prob 0.5 --mixup-mode batch "
    "--teacher-model regnety_160 --distillation-type none --distillation-alpha 0.5 --distillation-tau 1 "
    "--data-set IMNET --inat-category name --seed 0 --start_epoch 0 --pin-mem --world_size 1 --dist_url env:// "
    "--input-size 224"
)
ABSENT = ("model_ema_force_cpu", "opt_betas", "clip_grad", "lr_noise", "resplit", "cutmix_minmax", "teacher_path")


def assert_defaults(parser: argparse.ArgumentParser, args: argparse.Namespace, own: str, absent: tuple[str, ...]):
    """``args`` hold DeiT's defaults and those of ``own``, as a command line; flags of neither are false or empty."""
    assert_values_arrive(parser, [*GIVEN.split(), *own.split()], args)
    for flag in (*ABSENT, "resume", "eval", "dist_eval", *absent):
        assert not getattr(args, flag), flag
