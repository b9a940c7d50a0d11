"""Command lines as published, by script."""

COMMANDS = {
    "snn_eval": [
        "--model-name wide_resnet28w2 --pretrained x.pth.tar --normalize True --use-pred --root-path /data "
        "--image-folder imagenet --dataset-name imagenet_fine_tune --subset-path imagenet_subsets --device cuda:0 "
        "--unlabeled-frac 0.99 --split-seed 152.0"
    ]
}
CHANGED = {  # flags whose value is another one after parsing: truth values, other names, joined folders
    "snn_eval": ("--root-path", "--image-folder", "--device", "--use-pred"),
}
