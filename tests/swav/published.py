"""Command lines as published, by script."""

COMMANDS = {
    "main_swav": [
        "--data_path /imagenet/train --epochs 400 --base_lr 0.6 --final_lr 0.0006 --warmup_epochs 0 --batch_size 32 "
        "--size_crops 224 96 --nmb_crops 2 6 --min_scale_crops 0.14 0.05 --max_scale_crops 1. 0.14 --use_fp16 true "
        "--freeze_prototypes_niters 5005 --queue_length 3840 --epoch_queue_starts 15",
        "--data_path /imagenet/train --nmb_crops 2 6 --size_crops 224 96 --min_scale_crops 0.14 0.05 "
        "--max_scale_crops 1. 0.14 --crops_for_assign 0 1 --temperature 0.1 --epsilon 0.05 --sinkhorn_iterations 3 "
        "--feat_dim 128 --nmb_prototypes 3000 --queue_length 0 --epochs 800 --batch_size 64 --base_lr 4.8 --final_lr "
        "0.0048 --freeze_prototypes_niters 313 --wd 0.000001 --warmup_epochs 10 --start_warmup 0.3 --dist_url "
        "tcp://host:40000 --arch resnet50 --use_fp16 true --sync_bn apex --dump_path /run --world_size 64 --rank 0 "
        "--local_rank 3 --workers 10",
    ],
    "main_deepclusterv2": [
        "--data_path /imagenet/train --nmb_crops 2 4 --size_crops 160 96 --min_scale_crops 0.08 0.05 "
        "--max_scale_crops 1. 0.14 --crops_for_assign 0 1 --temperature 0.1 --feat_dim 128 --nmb_prototypes 3000 3000 "
        "3000 --epochs 400 --batch_size 64 --base_lr 4.8 --final_lr 0.0048 --freeze_prototypes_niters 300000 --wd "
        "0.000001 --warmup_epochs 10 --start_warmup 0.3 --dist_url tcp://host:40000 --arch resnet50 --sync_bn apex "
        "--dump_path /run"
    ],
    "eval_linear": [
        "--data_path /imagenet --pretrained swav_800ep_pretrain.pth.tar --dump_path out --workers 10 --arch resnet50w2 "
        "--use_bn True --global_pooling false --nesterov 0 --scheduler_type step --decay_epochs 96 96 --gamma 0.2 "
        "--dist_url env:// --world_size -1 --rank 0 --local_rank 0"
    ],
    "eval_semisup": [
        "--data_path /imagenet --pretrained swav_800ep_pretrain.pth.tar --labels_perc 1 --lr 0.02 --lr_last_layer 5 "
        "--dump_path out"
    ],
}
CHANGED = {  # flags whose value is another one after parsing: truth values, other names, joined folders
    "eval_linear": ("--nesterov",),
}
