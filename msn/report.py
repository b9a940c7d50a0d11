"""End-of-run report: signs of a collapse, pictures, and what to run next."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from shared.evaluation.knn_monitor import KNNMonitor
from shared.multicrop import MultiCropDataset
from shared.pictures.attention import save_attention
from shared.pictures.report import Plot, Report, accuracy_plot, first_image, save_views
from shared.run.health import HealthRule, equal_features, patience, shares_of_ln_k, still_at_ln_k
from shared.run.run import Run
from shared.run.settings import long_warmup, more_than_data, slow_average, tell_settings

from .hub import MEAN, STD
from .vision_transformer import Trunk, draw_kept_patches

LOSS = {"msn": "cross-entropy of anchors and targets", "me_max": "KL of the mean assignment from the prior"}
TARGETS = {"target_entropy": "entropy of a target", "information": "what targets tell about their image"}
CURVES = (
    Plot("Loss", "nats", LOSS),
    Plot("Collapse shows as targets that tell nothing", "nats", TARGETS, reference=("ln_k", "ln K: a uniform target")),
    accuracy_plot("Weighted k-NN of the target encoder"),
)
GREY = 128  # of a patch that is not seen


def health_rules(args: argparse.Namespace, steps_per_epoch: int) -> list[HealthRule]:
    """Signs of a collapse in the lines of the log, and the flags to try.

    Targets have two ways to say nothing about their image: all assigned to one prototype, which mean-entropy
    maximisation prevents, and all spread over every prototype, which sharpening prevents. At its start a healthy run
    may look uniform and flat: the verdicts on these wait for the end of the warm-up.
    """
    first_step = patience(args.epochs, steps_per_epoch)
    after_warmup = first_step + round(args.warmup * steps_per_epoch)
    no_information = {"information": (-1, 0.02)}
    return [
        HealthRule(
            "uniform",
            shares_of_ln_k(target_entropy=(0.8, 2), **no_information),
            "COLLAPSE: the targets are spread over all prototypes (entropy {target_entropy:.3f} of ln K = {ln_k:.3f}): "
            "lower --start_sharpen and --final_sharpen, or make the views milder.",
            after_warmup,
        ),
        HealthRule(
            "one assignment",
            shares_of_ln_k(**no_information),
            "COLLAPSE: all targets have nearly the same assignment ({information:.4f} nats tell images apart): keep "
            "--me_max true, raise --memax_weight (5 without Sinkhorn), or --use_sinkhorn true.",
            first_step,
        ),
        equal_features("embedding", "lower --lr, lengthen --warmup, or keep --use_bn true.", first_step),
        still_at_ln_k(
            "cross-entropy",
            "anchors that know nothing",
            "raise --lr or lower --ema for short runs; with few images lower --num_proto.",
            after_warmup,
            key="msn",
        ),
    ]


def suit_settings(args: argparse.Namespace, num_images: int, momenta: np.ndarray) -> None:
    """Name or change settings that make no sense for so few images and steps; momenta: of the target encoder."""
    tell_settings(
        args,
        long_warmup("--warmup", args.warmup, args.epochs),
        slow_average("--ema", momenta, "target encoder", args.ema[1]),
        more_than_data("--num_proto", args.num_proto, num_images),
    )


def report(run: Run, dataset: MultiCropDataset, trunk: Trunk, knn: KNNMonitor) -> None:
    """Draw views, curves and what the target encoder sees, and print the text; every rank must call this."""

    def draw_views(path: Path) -> None:
        save_view_sheet(dataset[(0, 0)][0], trunk.encoder.patch_embed.patch_size, run.args.patch_drop, path)

    def draw_attention(path: Path) -> None:
        save_attention(trunk.encoder, first_image(dataset.source, knn).to(run.device), path.parent, MEAN, STD)

    ending = Report(run, "msn/main.py")
    ending.draw("views.png", draw_views)
    ending.draw_neighbours(trunk, dataset.source, knn)
    ending.draw_curves("MSN training", CURVES)
    ending.draw("attention/attention.png", draw_attention)

    network = {"pretrained": run.path.parent, "fname": run.path.name}  # its file states model and image size
    if knn.sources:
        fewest = int(np.bincount(knn.sources[0].labels).min())  # images of a class
        ending.then("msn/logistic_eval.py", **network, imgs_per_class=min(5, fewest))
        ending.then("msn/eval_knn.py", **network, nb_knn=knn.k)
    if run.args.in_chans in (1, 3):
        image = {"image_path": "YOUR_IMAGE", "image_size": 2 * run.args.rand_size}
        ending.then("msn/visualize_attention.py", **network, **image, output_dir=run.output_dir / "attention")
    ending.finish(knn=knn)


def save_view_sheet(views: Sequence[Tensor], patch_size: int, patch_drop: float, path: Path) -> Path:
    """The views of one image, the patches that a mask hides in grey.

    Args:
        views: Images (uint8, (V, C, H, W)) by size: the target and the random anchors, the focal anchors. The first
            anchors that there are lose patches.
    """
    (target, *random), *focal = views
    focal = [view for group in focal for view in group]
    masked = random or focal
    if patch_drop:
        kept = draw_kept_patches((masked[0].shape[-1] // patch_size) ** 2, patch_drop)
        masked[:] = [hide_patches(view, kept, patch_size) for view in masked]
    titles = ["target, {px} px"] + ["random anchor, {px} px"] * len(random) + ["focal anchor, {px} px"] * len(focal)
    heading = "One image as it enters the encoders\nThe target encoder sees the target, the encoder all anchors."
    return save_views([[target, *random], focal], titles, path, heading, per_row=10)


def hide_patches(view: Tensor, kept: Tensor, patch_size: int) -> Tensor:
    """The image (C, H, W), uint8, with all patches grey but those with the numbers ``kept``, row by row."""
    rows, columns = (side // patch_size for side in view.shape[1:])
    seen = torch.zeros(rows * columns, dtype=torch.bool).index_fill(0, kept, True).view(rows, columns)
    seen = seen.repeat_interleave(patch_size, 0).repeat_interleave(patch_size, 1)
    rest = view.shape[1] - seen.shape[0], view.shape[2] - seen.shape[1]
    return torch.where(F.pad(seen, (0, rest[1], 0, rest[0])), view, GREY)
