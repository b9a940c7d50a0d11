#!/usr/bin/env bash
# DeepCluster-v2, ResNet-50, 400 epochs, 2x224, batch 4096 on 64 GPUs: 70.2 % (published, linear)
set -euo pipefail
source "$(dirname "$0")/launch.sh"
launch main_deepclusterv2 8 8 25 \
    --nmb_crops 2 --size_crops 224 --min_scale_crops 0.08 --max_scale_crops 1. \
    --crops_for_assign 0 1 --temperature 0.1 --feat_dim 128 --nmb_prototypes 3000 3000 3000 \
    --epochs 400 --batch_size 64 --base_lr 4.8 --final_lr 0.0048 --warmup_epochs 10 --start_warmup 0.3 --wd 0.000001 \
    --freeze_prototypes_niters 300000 \
    --arch resnet50 --hidden_mlp 2048 --sync_bn apex --syncbn_process_group_size 8 \
    "$@"
