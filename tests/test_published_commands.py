"""Command lines of the papers' repositories, as published: every value arrives under the name of its flag."""

import importlib

import pytest

from tests.command_lines import assert_values_arrive

NETWORK = "--pretrained_weights w.pth --checkpoint_key teacher --arch vit_small --patch_size 8 "
PROCESSES = "--num_workers 4 --dist_url env:// --local_rank 1 "
DINO = {
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
SWAV = {
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
DEEPCLUSTER = {
    "main": [
        "/imagenet/train --exp /run --arch alexnet --lr 0.05 --wd -5 --k 10000 --sobel --verbose --workers 12",
        "/imagenet -a alexnet --sobel --clustering PIC --nmb_cluster 100 --reassign 3 --epochs 200 --start_epoch 2 "
        "--batch 256 --momentum 0.9 --resume /run/checkpoint.pth.tar --checkpoints 25000 --seed 31 --exp /run",
    ],
    "eval_linear": [
        "--model m --data /imagenet --conv 3 --lr 0.01 --wd -7 --tencrops --verbose --exp /run --workers 12"
    ],
    "eval_voc_classif": ["--vocdir /v --split trainval --model m --fc6_8 1 --train_batchnorm 0"],
    "gradient_ascent": ["--model m --exp /e --conv 6 --arch vgg16"],
    "activ_retrieval": ["--model m --exp /e --conv 1 --data /imagenet"],
}
XCIT = {
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
RESMLP = {
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
CONTRIEVER = {
    "train": [
        "--retriever_model_id bert-base-uncased --pooling average --augmentation delete --prob_augmentation 0.1 "
        "--train_data encoded-data/bert-base-uncased/wiki encoded-data/bert-base-uncased/cc-net --loading_mode split "
        "--ratio_min 0.05 --ratio_max 0.5 --chunk_length 256 --momentum 0.9995 --queue_size 131072 --temperature 0.05 "
        "--warmup_steps 20000 --total_steps 500000 --lr 0.00005 --scheduler linear --optim adamw --per_gpu_batch_size "
        "64 --output_dir /checkpoint/contriever --projection_size 768 --main_port 10002",
        "--retriever_model_id bert-base-uncased --moco_queue 131072 --momentum 0.9995 --temperature 0.05 "
        "--augmentation delete --prob_augmentation 0.1 --train_data wiki --warmup_steps 20000 --total_steps 500000",
        "--retriever_model_id bert-base-multilingual-cased --pooling average --train_data af ar az be bg "
        "--loading_mode split --ratio_min 0.1 --ratio_max 0.5 --chunk_length 256 --momentum 0.999 --queue_size 32768 "
        "--temperature 0.05 --warmup_steps 20000 --total_steps 500000 --lr 0.00005 --sampling_coefficient 0.0",
    ],
    "generate_passage_embeddings": [
        "--model_name_or_path facebook/contriever --output_dir contriever_embeddings --passages psgs_w100.tsv "
        "--shard_id 0 --num_shards 1"
    ],
    "passage_retrieval": [
        "--model_name_or_path facebook/contriever --passages psgs_w100.tsv --passages_embeddings "
        "contriever_embeddings/* --data nq_dir/test.json --output_dir contriever_nq"
    ],
    "eval_beir": [
        "--model_name_or_path facebook/contriever-msmarco --dataset scifact --beir_dir /data --lower_case --local_rank "
        "-1 --main_port -1 --score_function dot"
    ],
}
PAWS = {
    "snn_eval": [
        "--model-name wide_resnet28w2 --pretrained x.pth.tar --normalize True --use-pred --root-path /data "
        "--image-folder imagenet --dataset-name imagenet_fine_tune --subset-path imagenet_subsets --device cuda:0 "
        "--unlabeled-frac 0.99 --split-seed 152.0"
    ]
}
MSN = {
    "logistic_eval": [
        "--lambd 0.0025 --penalty l2 --mask 0.0 --preload --fname vits16_800ep.pth.tar --model-name deit_small "
        "--pretrained msn_os/ --device cuda:0 --normalize True --root-path /datasets --image-folder imagenet "
        "--subset-path imagenet_subsets1/5imgs_class.txt"
    ]
}
FOLDERS = {"dino": DINO, "swav": SWAV, "deepcluster": DEEPCLUSTER, "xcit": XCIT, "resmlp": RESMLP}
FOLDERS |= {"contriever": CONTRIEVER, "paws": PAWS, "msn": MSN}
COMMANDS = [
    (f"{folder}.{script}", command)
    for folder, scripts in FOLDERS.items()
    for script, commands in scripts.items()
    for command in commands
]
CHANGED = {  # flags whose value is another one after parsing: truth values, other names, folders that are joined
    "dino.main_dino": ("--arch",),
    "dino.eval_knn": ("--use_cuda",),
    "dino.eval_linear": ("--avgpool_patchtokens",),
    "dino.eval_copy_detection": ("--use_cuda",),
    "dino.eval_image_retrieval": ("--multiscale", "--use_cuda"),
    "swav.eval_linear": ("--nesterov",),
    "paws.snn_eval": ("--root-path", "--image-folder", "--device", "--use-pred"),
    "msn.logistic_eval": ("--root-path", "--image-folder", "--device"),
}


@pytest.mark.parametrize(("module", "command"), COMMANDS)
def test_a_published_command_is_understood(module, command):
    script = importlib.import_module(module)
    parser = script.get_args_parser()
    args = getattr(script, "parse_args", parser.parse_args)(command.split())
    assert_values_arrive(parser, command.split(), args, CHANGED.get(module, ()))
