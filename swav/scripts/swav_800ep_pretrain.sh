#!/usr/bin/env bash
# SwAV, ResNet-50, 800 epochs, 2x224 + 6x96, batch 4096 on 64 GPUs: 75.3 % (published, linear)
set -euo pipefail
source "$(dirname "$0")/launch.sh"
launch main_swav 8 8 50 \
    --nmb_crops 2 6 --size_crops 224 96 --min_scale_crops 0.14 0.05 --max_scale_crops 1. 0.14 \
    --crops_for_assign 0 1 --temperature 0.1 --epsilon 0.05 --sinkhorn_iterations 3 --feat_dim 128 --nmb_prototypes 3000 \
    --queue_length 0 \
    --epochs 800 --batch_size 64 --base_lr 4.8 --final_lr 0.0048 --warmup_epochs 10 --start_warmup 0.3 --wd 0.000001 \
    --freeze_prototypes_niters 313 \
    --arch resnet50 --hidden_mlp 2048 --use_fp16 true --sync_bn apex --syncbn_process_group_size 8 \
    "$@"
