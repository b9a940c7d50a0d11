"""Command lines as published, by script."""

COMMANDS = {
    "logistic_eval": [
        "--lambd 0.0025 --penalty l2 --mask 0.0 --preload --fname vits16_800ep.pth.tar --model-name deit_small "
        "--pretrained msn_os/ --device cuda:0 --normalize True --root-path /datasets --image-folder imagenet "
        "--subset-path imagenet_subsets1/5imgs_class.txt"
    ]
}
CHANGED = {  # flags whose value is another one after parsing: truth values, other names, joined folders
    "logistic_eval": ("--root-path", "--image-folder", "--device"),
}
