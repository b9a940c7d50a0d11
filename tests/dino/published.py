"""Command lines as published, by script."""

NETWORK = "--pretrained_weights w.pth --checkpoint_key teacher --arch vit_small --patch_size 8 "
PROCESSES = "--num_workers 4 --dist_url env:// --local_rank 1 "
COMMANDS = {
    "main_dino": [
        "--arch vit_small --data_path /imagenet/train --output_dir /run",
        "--arch deit_small --data_path /imagenet/train --output_dir /run --local_rank 3",
        "--arch vit_small --data_path /imagenet/train --output_dir /run --local-rank=0 --epochs 300 "
        "--teacher_temp 0.07 --warmup_teacher_temp_epochs 30 --norm_last_layer false",
        "--arch resnet50 --optimizer sgd --lr 0.03 --weight_decay 1e-4 --weight_decay_end 1e-4 --global_crops_scale "
        "0.14 1 --local_crops_scale 0.05 0.14 --data_path /imagenet/train --output_dir /run",
        "--arch vit_small --patch_size 16 --out_dim 65536 --momentum_teacher 0.996 --use_bn_in_head false --use_fp16 "
        "True --clip_grad 0 --batch_size_per_gpu 64 --freeze_last_layer 1 --warmup_epochs 10 --min_lr 1e-5 "
        "--drop_path_rate 0.1 --local_crops_number 8 --saveckp_freq 20 --seed 0 --num_workers 10 --dist_url env:// "
        "--data_path /imagenet/train",
    ],
    "eval_knn": [
        f"{NETWORK} {PROCESSES} --data_path /imagenet --batch_size_per_gpu 64 --nb_knn 10 20 --temperature 0.1 "
        "--use_cuda False --dump_features f --load_features g"
    ],
    "eval_linear": [
        f"{NETWORK} {PROCESSES} --n_last_blocks 1 --avgpool_patchtokens true --epochs 100 --lr 0.001 --evaluate "
        "--batch_size_per_gpu 128 --data_path /imagenet --val_freq 1 --output_dir out --num_labels 1000"
    ],
    "eval_copy_detection": [
        f"{NETWORK} {PROCESSES} --data_path /copydays --whitening_path /whitening --distractors_path /distractors "
        "--imsize 320 --batch_size_per_gpu 16 --use_cuda true"
    ],
    "eval_image_retrieval": [
        f"{NETWORK} {PROCESSES} --imsize 512 --multiscale 1 --data_path /data --dataset rparis6k --use_cuda true"
    ],
    "eval_video_segmentation": [
        f"{NETWORK} --data_path /davis --output_dir out --n_last_frames 7 --size_mask_neighborhood 12 --topk 5 --bs 6"
    ],
}
CHANGED = {  # flags whose value is another one after parsing: truth values, other names, joined folders
    "main_dino": ("--arch",),
    "eval_knn": ("--use_cuda",),
    "eval_linear": ("--avgpool_patchtokens",),
    "eval_copy_detection": ("--use_cuda",),
    "eval_image_retrieval": ("--multiscale", "--use_cuda"),
}
