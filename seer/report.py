"""End-of-run report: signs of a collapse, pictures, and what to run next."""

import argparse

from torch import nn

from shared.evaluation.knn_monitor import KNNMonitor
from shared.images.training_data import TrainingData
from shared.multicrop import MultiCropDataset
from shared.pictures.report import Plot, Report, accuracy_plot
from shared.run.health import HealthRule, equal_features, few_prototypes, still_at_ln_k, uniform_codes
from shared.run.run import Run
from shared.run.settings import long_freeze, more_than_data, tell_settings

LOSS = {"loss": "loss", "code_entropy": "entropy of the assignments"}
CURVES = (
    Plot("Prediction of the assignments", "nats", LOSS, reference=("ln_k", "ln K: knows nothing")),
    Plot("Prototypes of a step", "number", {"prototypes_used": "used", "prototype_perplexity": "perplexity"}),
    accuracy_plot("Weighted k-NN of the features"),
)


def health_rules(nmb_prototypes: int, total_steps: int) -> list[HealthRule]:
    """Signs of a collapse in the lines of the log, and the flags to try."""
    first_step = max(50, total_steps // 20)
    lower = "lower --base_lr, or lengthen --warmup and --freeze_prototypes_niters"
    uniform = "lower --epsilon, or take more --nmb_prototypes than --feat_dim"
    return [
        uniform_codes(uniform, first_step),
        few_prototypes(nmb_prototypes, lower, first_step),
        equal_features("embedding", lower, first_step),
        still_at_ln_k("loss", "a network that knows nothing about the other view", lower, first_step),
    ]


def suit_settings(args: argparse.Namespace, data: TrainingData, total_steps: int) -> None:
    """Name or change settings that make no sense for so few images and steps."""
    tell_settings(
        args,
        more_than_data("--nmb_prototypes", args.nmb_prototypes, len(data.dataset)),
        long_freeze("--freeze_prototypes_niters", args.freeze_prototypes_niters, total_steps),
    )


def report(run: Run, dataset: MultiCropDataset, trunk: nn.Module, knn: KNNMonitor) -> None:
    """Draw the views, neighbours and curves, and print the text; every rank must call this."""
    ending = Report(run, "seer/main_seer.py")
    titles = [f"crop {n}, {{px}} px" for n in range(len(dataset.recipes))]
    heading = "One image as it enters the network\nEvery crop predicts the assignments of the others."
    ending.draw_views(dataset, titles, heading)
    ending.draw_neighbours(trunk, dataset.source, knn)
    ending.draw_curves("SEER's training on a stream", CURVES)
    last = [line for line in ending.lines if "prototypes_used" in line][-1:]
    used = [f"{line['prototypes_used']:.0f} prototypes used by {line['assigned']:.0f} assignments" for line in last]
    if knn.sources:
        linear = {"num_labels": len(knn.sources[1].classes), "output_dir": run.output_dir / "linear"}
        ending.then("seer/eval_linear.py", pretrained=run.path, **linear)
    ending.finish(used, knn, lr_flag="--base_lr", small_data=True)
