"""Use of the prototypes, collapse diagnostics and the end-of-run report."""

import math
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor, nn

from shared import distributed
from shared.evaluation.knn_monitor import KNNMonitor
from shared.evaluation.neighbours import save_nearest_neighbours
from shared.multicrop import MultiCropDataset
from shared.pictures.report import Plot, accuracy_plot, pictures_folder, save_curves, save_views, view_tiles
from shared.run.health import HealthMonitor, HealthRule
from shared.run.log import read_log
from shared.run.run import Run
from shared.run.summary import command, end_of_run

from .hub import MEAN, STD

# --- Use of the prototypes --------------------------------------------------------------------------------------------


def usage_of(counts: Tensor) -> dict[str, Tensor]:
    """Statistics of the number of images that each of K prototypes got; 0-d tensors.

    ``assigned``: images; ``prototypes_used``: prototypes that got any; ``prototype_perplexity``: the number of equally
    used prototypes with the same entropy.
    """
    shares = counts / counts.sum().clamp_min(1)
    return {
        "assigned": counts.sum(),
        "prototypes_used": (counts > 0).sum(),
        "prototype_perplexity": torch.special.entr(shares).sum().exp(),
    }


class PrototypeUsage:
    """Counts for every prototype the images that were assigned to it in this epoch, on all processes.

    Args:
        nmb_prototypes: K.
    """

    def __init__(self, nmb_prototypes: int, device: torch.device | str = "cpu"):
        self.counts = torch.zeros(nmb_prototypes, dtype=torch.int64, device=device)

    @torch.no_grad()
    def add(self, codes: Tensor) -> None:
        """Count the likeliest prototype of every code (B, K); codes that are not finite count for none."""
        self.counts.index_add_(0, codes.argmax(dim=1), codes.isfinite().all(dim=1).long())

    def summary(self) -> dict[str, Tensor]:
        """:func:`usage_of` the counts of all processes, which must all call this."""
        return usage_of(distributed.all_reduce_sum(self.counts))

    def end_epoch(self) -> dict[str, int]:
        """``prototypes_used`` and ``dead_prototypes``; every process must call this. The next epoch counts from 0."""
        used = int(self.summary()["prototypes_used"])
        self.counts.zero_()
        return {"prototypes_used": used, "dead_prototypes": len(self.counts) - used}

    def state_dict(self) -> dict:
        """Counts of all processes, which must all call this."""
        return {"counts": distributed.all_reduce_sum(self.counts)}

    def load_state_dict(self, state: dict) -> None:
        """Go on counting; an official checkpoint has no counts, its state is empty."""
        if state and distributed.is_main_process():
            self.counts.copy_(state["counts"])


# --- Collapse diagnostics ---------------------------------------------------------------------------------------------

SWAV_ADVICE = {
    "uniform": "lower --epsilon (0.03), or take more --nmb_prototypes than --feat_dim",
    "few": "lengthen --freeze_prototypes_niters, lower --base_lr, or take fewer --nmb_prototypes or a longer "
    "--queue_length for a small batch",
    "features": "lower --base_lr, or lengthen --warmup_epochs and --freeze_prototypes_niters",
    "flat": "lower --epsilon (0.03), take more --nmb_prototypes than --feat_dim, fewer or larger crops, or lengthen "
    "--freeze_prototypes_niters",
}
DEEPCLUSTERV2_ADVICE = {
    "few": "lower --base_lr, or take fewer --nmb_prototypes",
    "features": "lower --base_lr, or lengthen --warmup_epochs",
    "flat": "take fewer --nmb_prototypes, fewer or larger crops, or a higher --base_lr",
}


def collapse_monitor(
    nmb_prototypes: int, total_steps: int, steps_per_epoch: int, advice: dict[str, str]
) -> HealthMonitor:
    """What the lines of the log say about a collapse.

    The first verdict comes after a quarter of the run, or of a long one after two epochs and a little more: random
    networks look flat.

    Args:
        nmb_prototypes: K, for several sets that of the smallest.
        advice: Flags to try, by kind of failure.
    """
    ln_k = math.log(nmb_prototypes)
    # a random assignment of n images to K prototypes has a perplexity of more than half of the smaller number
    failures = {
        "uniform": (
            lambda line: line.get("code_entropy", 0.0) > 0.99 * ln_k,
            "COLLAPSE: the codes are uniform (entropy {code_entropy:.3f} of ln K = {ln_k:.3f}), every image belongs to "
            "every prototype",
        ),
        "few": (
            lambda line: line["prototype_perplexity"] < 0.1 * min(nmb_prototypes, line["assigned"]),
            "COLLAPSE: few prototypes are used (perplexity {prototype_perplexity:.1f}, {prototypes_used:.0f} of "
            f"{nmb_prototypes} got any of {{assigned:.0f}} images)",
        ),
        "features": (
            lambda line: line["feature_spread"] < 0.02,
            "COLLAPSE: all images have nearly the same embedding (spread {feature_spread:.4f})",
        ),
        "flat": (
            twice_in_a_row(lambda line: abs(line["loss"] / ln_k - 1) < 0.005),
            "the loss is still at ln K = {ln_k:.3f}, the value of a network that knows nothing about the other view's "
            "code",
        ),
    }
    first_step = min(total_steps // 4, 2 * steps_per_epoch + 1000)
    return HealthMonitor(
        [
            HealthRule(name, condition, f"{sentence}: {advice[name]}", first_step)
            for name, (condition, sentence) in failures.items()
            if name in advice
        ]
    )


def twice_in_a_row(condition: Callable[[dict], bool]) -> Callable[[dict], bool]:
    """Holds where ``condition`` holds and held on the line before: a loss that only passes by is no problem."""
    held = False

    def holds_again(line: dict) -> bool:
        nonlocal held
        before, held = held, condition(line)
        return before and held

    return holds_again


# --- End-of-run report ------------------------------------------------------------------------------------------------


def plots(has_codes: bool) -> list[Plot]:
    """What the curves show; DeepCluster-v2 has clusters, no codes."""
    prediction = {"loss": "loss"} | ({"code_entropy": "entropy of the codes"} if has_codes else {})
    usage = {"prototypes_used": "used in the epoch so far", "prototype_perplexity": "perplexity"}
    return [
        Plot("Prediction of the codes", "nats", prediction, reference=("ln_k", "ln K: knows nothing")),
        Plot("Prototypes", "number", usage),
        accuracy_plot("Weighted k-NN of the features"),
    ]


def save_pictures(
    heading: str, run: Run, trunk: nn.Module, views: MultiCropDataset, knn: KNNMonitor, image_size: int
) -> list[Path]:
    """Views of one image, curves, and neighbours of ten validation images (of training images where there was no k-NN).

    Every rank must call this. ``views`` is the training set, ``image_size`` the side in pixels for the trunk.
    """
    folder = pictures_folder(run.output_dir)
    file = folder / "neighbours.png"
    neighbours = save_nearest_neighbours(trunk, views, knn, image_size, MEAN, STD, file, run.device)
    if not distributed.is_main_process():
        return []
    groups, _, _ = views[(0, 0)]
    numbers = accumulate((len(group) for group in groups), initial=0)
    tiles = [view_tiles(group, "crop {n}, {px} px", first) for group, first in zip(groups, numbers, strict=False)]
    caption = "One image as it enters the network\nEvery crop predicts the codes of the others."
    log = run.output_dir / "metrics.jsonl"
    has_codes = any("code_entropy" in line for line in read_log(log))
    return [
        save_views(tiles, folder / "views.png", caption),
        neighbours,
        save_curves(log, folder / "curves.png", heading, plots(has_codes)),
    ]


def summary(script: str, run: Run, arch: str, data_path: str | None, knn: KNNMonitor, pictures: list[Path]) -> str:
    """What was learned, where the files are and what to run next, as text for the end of a run."""
    last = [line for line in read_log(run.output_dir / "metrics.jsonl") if "loss" in line][-1]
    used = (
        f"{last['prototypes_used']:.0f} prototypes used by the {last['assigned']:.0f} assignments of the last epoch "
        f"(perplexity {last['prototype_perplexity']:.1f})"
    )
    flags = {"arch": arch, "pretrained": run.path, "data_path": data_path}
    commands = [
        command("clusters.py", **flags),
        command("eval_linear.py", **flags),
        f"python {script} --data_path YOUR_IMAGES --dump_path YOUR_RUN",
    ]
    problems = list(run.health.warnings.values())
    return end_of_run(run.output_dir, run.path, knn, pictures, commands, learned=(used,), problems=problems)
