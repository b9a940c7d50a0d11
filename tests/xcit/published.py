"""Command lines as published, by script."""

COMMANDS = {
    "main": [
        "--model xcit_small_12_p16 --batch-size 128 --drop-path 0.05 --output_dir /run --epochs 400 --data_path /data",
        "--eval --model xcit_small_12_p16 --input-size 384 --full_crop --pretrained weights.pth --data-path /imagenet",
        "--model xcit_nano_12_p8 --batch-size 128 --drop-path 0.0 --data-set INAT19 --inat-category genus --resume "
        "r.pth --no-model-ema --no-repeated-aug --no-pin-mem --dist-eval --model-ema-force-cpu --opt-betas 0.9 0.99 "
        "--seed 3 --sched step --lr-noise 0.4 0.9 --dr 0.2 --cutmix-minmax 0.2 0.8 --mixup-mode elem --surgery w.pth "
        "--clip-grad 1 --teacher-model regnety_160 --teacher-path t.pth --distillation-type hard --distillation-tau 2 "
        "--world_size 8 --data_path /data",
    ]
}
