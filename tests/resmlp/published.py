"""Command lines as published, by script."""

COMMANDS = {
    "main": [
        "--model resmlp_24 --batch-size 256 --data-path /imagenet --output_dir /run",
        "--eval --resume weights.pth --model resmlp_36 --eval-crop-ratio 0.9 --data-path /imagenet --data-set IMNET",
        "--model resmlp_12 --batch-size 64 --bce-loss --unscale-lr --drop 0.1 --drop-path 0.05 --no-model-ema "
        "--model-ema-decay 0.9 --model-ema-force-cpu --opt lamb --opt-eps 1e-7 --opt-betas 0.9 0.99 --clip-grad 1 "
        "--momentum 0.8 --weight-decay 0.2 --sched step --lr 5e-3 --lr-noise 0.4 0.9 --lr-noise-pct 0.5 --lr-noise-std "
        "2 --warmup-lr 1e-5 --min-lr 1e-6 --decay-epochs 10 --warmup-epochs 3 --cooldown-epochs 1 --patience-epochs 2 "
        "--dr 0.2 --data_path /data",
        "--color-jitter 0.2 --aa original --smoothing 0 --train-interpolation bilinear --no-repeated-aug "
        "--no-train-mode --ThreeAugment --src --reprob 0 --remode rand --recount 2 --resplit --mixup 0 --cutmix 0 "
        "--cutmix-minmax 0.2 0.8 --mixup-prob 0.5 --mixup-switch-prob 0.1 --mixup-mode elem --cosub --finetune f.pth "
        "--attn-only --data_path /data",
        "--teacher-model regnety_160 --teacher-path t.pth --distillation-type hard --distillation-alpha 0.1 "
        "--distillation-tau 3 --data-set INAT19 --inat-category genus --device cpu --seed 1 --start_epoch 2 "
        "--dist-eval --num_workers 3 --no-pin-mem --distributed --world_size 8 --dist_url env:// --input-size 384 "
        "--epochs 400 --data_path /data",
    ]
}
