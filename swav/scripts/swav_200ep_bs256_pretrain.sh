#!/usr/bin/env bash
# SwAV, ResNet-50, 200 epochs, 2x224 + 6x96, batch 256 on 4 GPUs, with the queue: 72.7 % (published, linear)
set -euo pipefail
source "$(dirname "$0")/launch.sh"
launch main_swav 1 4 72 \
    --nmb_crops 2 6 --size_crops 224 96 --min_scale_crops 0.14 0.05 --max_scale_crops 1. 0.14 \
    --crops_for_assign 0 1 --temperature 0.1 --epsilon 0.05 --sinkhorn_iterations 3 --feat_dim 128 --nmb_prototypes 3000 \
    --queue_length 3840 --epoch_queue_starts 15 \
    --epochs 200 --batch_size 64 --base_lr 0.6 --final_lr 0.0006 --warmup_epochs 0 --wd 0.000001 \
    --freeze_prototypes_niters 5005 \
    --arch resnet50 --hidden_mlp 2048 --use_fp16 true --sync_bn pytorch \
    "$@"
