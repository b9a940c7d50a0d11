"""Fine-tune the whole encoder with labels, by the recipe of MAE (Assran et al. 2022, appendix A.4).

    python fine_tune.py --epochs 3                           # embedded materials, weights of the run in runs/materials
    torchrun --nproc_per_node=8 fine_tune.py --model_name deit_base --batch_size 128 --data_path /path/to/imagenet \\
        --output_dir /path/to/fine_tune                      # released ViT-B/16: 83.4

Mixup, cutmix, RandAugment, label smoothing and stochastic depth keep the network from learning the train images by
heart; the learning rate falls from block to block towards the input. The result is the accuracy after the last epoch.
Running the same command again resumes.
"""

import argparse
import re
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import shared.run.passive_threads  # noqa: F401

import numpy as np
import torch
from timm.data import Mixup
from torch import nn

from msn.flags import add_data_flags, finish, load_chosen_encoder, network_parser
from msn.hub import MEAN, STD
from msn.labelled_training import Validation, from_official, to_official, training_batches
from msn.vision_transformer import DropPath, VisionTransformer
from shared import distributed
from shared.evaluation import frozen
from shared.evaluation.flags import add_process_flags
from shared.images.loading import EvalTransform
from shared.networks.backbones import input_channels
from shared.networks.weights import weights_checksum
from shared.optimisation.optim import clip_grad_norm_per_tensor_
from shared.optimisation.schedules import cosine_schedule
from shared.run.flags import add_run_flags, bool_flag
from shared.run.run import Run
from shared.supervised.data import LabelledViews
from shared.supervised.transforms import TrainTransform

# A run that is resumed must have these as they were.
RUN_FLAGS = tuple(
    """model_name num_classes image_size crop_scale flip rand_augment erase mixup cutmix smoothing drop_path epochs
    warmup_epochs lr layer_decay weight_decay seed""".split()
)


def get_args_parser() -> argparse.ArgumentParser:
    parser = network_parser(__doc__)
    add = add_data_flags(parser)
    add("--num_classes", type=int, default=1000, help="outputs of the classifier")

    add = parser.add_argument_group("augmentation").add_argument
    add("--crop_scale", type=float, nargs=2, default=(0.08, 1.0), help="area range of the train crops")
    add("--flip", type=bool_flag, default=True, help="horizontal flips")
    add("--rand_augment", default="rand-m9-mstd0.5-inc1", help="RandAugment in timm's words; empty: none")
    add("--erase", type=float, default=0.25, help="probability of erasing a rectangle")
    add("--mixup", type=float, default=0.8, help="alpha of mixup; 0: none")
    add("--cutmix", type=float, default=1.0, help="alpha of cutmix; 0: none")
    add("--smoothing", type=float, default=0.1, help="label smoothing")
    add("--drop_path", type=float, default=0.2, help="stochastic depth of the last block (0.1 for transfer)")

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=int, default=100)
    add("--warmup_epochs", type=float, default=5, help="epochs of linear learning-rate warm-up from 0")
    add("--batch_size", type=int, default=128, help="images per process")
    add("--lr", type=float, default=0.002, help="peak learning rate of the classifier per 1,024 images of a step")
    add("--layer_decay", type=float, default=0.65, help="learning rate of a block over that of the next one")
    add("--weight_decay", type=float, default=0.05, help="of matrices")
    add("--amp", default="auto", choices=("auto", "bf16", "fp16", "fp32"), help="auto: bf16 where it is fast")
    add("--seed", type=int, default=0, help="of all draws")
    add("--output_dir", default=".", help="for fine-tune.pth.tar and fine-tune.txt")
    add_run_flags(parser, knn=False, pictures=False)
    add_process_flags(parser)
    return parser


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = get_args_parser()
    embedded = {"num_classes": 12, "crop_scale": (0.6, 1.0), "flip": False, "rand_augment": "", "erase": 0.0}
    embedded |= {"mixup": 0.0, "cutmix": 0.0, "batch_size": 32, "warmup_epochs": 1, "drop_path": 0.0, "lr": 0.016}
    args = finish(parser, lambda: parser.parse_args(arguments), output_dir="runs/materials/fine_tune", **embedded)
    args.crop_scale = tuple(args.crop_scale)
    if args.epochs < args.warmup_epochs:
        parser.error(f"--epochs {args.epochs} is less than --warmup_epochs {args.warmup_epochs}")
    if not 0 <= args.drop_path < 1:
        parser.error(f"--drop_path {args.drop_path} is outside [0, 1)")
    if (args.mixup or args.cutmix) and args.batch_size % 2:
        parser.error(f"--batch_size {args.batch_size}: mixup and cutmix need an even number of images")
    return args


def set_drop_path(encoder: VisionTransformer, rate: float) -> None:
    """Stochastic depth that grows linearly from 0 in the first block to ``rate`` in the last."""
    rates = np.linspace(0, rate, len(encoder.blocks))
    for block, block_rate in zip(encoder.blocks, rates.tolist(), strict=True):
        block.drop_path = DropPath(block_rate)


def layer_of(name: str, depth: int) -> int:
    """Depth of a parameter: 0 for the embeddings, i + 1 for block i, ``depth + 1`` for final norm and classifier."""
    if name.startswith(("cls_token", "pos_embed", "patch_embed")):
        return 0
    block = re.match(r"blocks\.(\d+)\.", name)
    return int(block[1]) + 1 if block else depth + 1


def param_groups(encoder: VisionTransformer, weight_decay: float, layer_decay: float) -> list[dict]:
    """One group per layer and kind; ``lr_scale`` is ``layer_decay`` to the power of the layers above."""
    depth = len(encoder.blocks)
    groups: dict[tuple[int, bool], dict] = {}
    for name, parameter in encoder.named_parameters():
        decays = parameter.ndim > 1 and name not in ("cls_token", "pos_embed")
        layer = layer_of(name, depth)
        scale = layer_decay ** (depth + 1 - layer)
        group = {"params": [], "weight_decay": weight_decay if decays else 0.0, "lr_scale": scale}
        groups.setdefault((layer, decays), group)["params"].append(parameter)
    return list(groups.values())


def fine_tune(args: argparse.Namespace) -> dict[str, float]:
    """Fine-tune and validate; loss and accuracies in percent after the last epoch."""
    run = Run(args, args.amp, "fine-tune.pth.tar", owns_folder=False)
    device = run.device
    network = load_chosen_encoder(args)
    train, val = frozen.labelled_sources(args, num_classes=args.num_classes)
    run.classes = train.classes

    # network: the encoder, and a new linear layer on its class token
    checksum = weights_checksum(network)
    network.requires_grad_(True)
    network.fc = nn.Linear(network.embed_dim, args.num_classes)
    nn.init.trunc_normal_(network.fc.weight, std=2e-5)
    nn.init.zeros_(network.fc.bias)
    set_drop_path(network, args.drop_path)
    network.to(device)

    # data
    in_chans = input_channels(network)
    transform = TrainTransform(
        args.image_size,
        MEAN,
        STD,
        auto_augment=args.rand_augment or None,
        color_jitter=None,
        erase_p=args.erase,
        in_chans=in_chans,
        crop_scale=args.crop_scale,
        flip=args.flip,
        augment_flag="--rand_augment",
    )
    bad_images = frozen.bad_images_of(args, train, run.output_dir / "bad_images.txt")
    views = LabelledViews(train, transform, args.seed, bad_images)
    data = training_batches(args, views, bad_images, train.checksum(), device)
    centre_crop = EvalTransform(round(args.image_size * 256 / 224), args.image_size, MEAN, STD, in_chans)
    val_set = frozen.val_images(args, val, centre_crop)
    validation = Validation(network, val_set, device, args.batch_size, args.num_workers)

    # loss, optimiser, schedule
    mix, criterion = None, nn.CrossEntropyLoss(label_smoothing=args.smoothing)
    if args.mixup or args.cutmix:  # which also smooths the labels
        mix = Mixup(args.mixup, args.cutmix, label_smoothing=args.smoothing, num_classes=args.num_classes)
        criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.AdamW(param_groups(network, args.weight_decay, args.layer_decay), lr=0.0)
    peak = args.lr * data.batch_size / 1024
    lrs = cosine_schedule(peak, 1e-6, args.epochs, data.steps_per_epoch, args.warmup_epochs)
    wrapped = distributed.wrap(network, device)

    run.resume(
        data,
        len(lrs),
        RUN_FLAGS,
        to_official=partial(to_official, pretrained=checksum),
        from_official=partial(from_official, pretrained=checksum, path=run.path),
        encoder=network,
        opt=optimizer,
        best_top1_acc=validation,
    )
    with run:
        for epoch in run.epochs():
            data.sampler.set_epoch(epoch, run.step_in_epoch)
            train_one_epoch(wrapped, criterion, data.loader, optimizer, lrs, mix, run)
            validation.end_epoch(run, bad_images)
    return validation.end()


def train_one_epoch(
    network: nn.Module,
    criterion: nn.Module,
    loader: Iterable,
    optimizer: torch.optim.Optimizer,
    lrs: np.ndarray,
    mix: Mixup | None,
    run: Run,
) -> None:
    """Cross-entropy on every batch of an epoch, whose images and labels ``mix`` mixes.

    Args:
        loader: Yields (normalised images, labels, indices).
        lrs: Learning rates of the classifier, one per step of the run.
    """
    parameters = list(network.parameters())
    network.train()
    for step, (images, labels, _) in run.steps(loader):
        for group in optimizer.param_groups:
            group["lr"] = float(lrs[step]) * group["lr_scale"]
        images, labels = (batch.to(run.device, non_blocking=True) for batch in (images, labels))
        if mix is not None:
            images, labels = mix(images, labels)
        with run.precision.autocast():
            logits = network(images)
        loss = criterion(logits.float(), labels)
        optimizer.zero_grad(set_to_none=True)
        run.backward(loss, optimizer)
        run.update(clip_grad_norm_per_tensor_(parameters, max_norm=0), optimizer)
        run.end_step(len(images), {"loss": loss, "lr": lrs[step]})


def main() -> None:
    distributed.run_script(fine_tune, parse_args)


if __name__ == "__main__":
    main()
