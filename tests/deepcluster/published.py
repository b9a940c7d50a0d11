"""Command lines as published, by script."""

COMMANDS = {
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
