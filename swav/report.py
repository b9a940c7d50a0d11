"""End-of-run report of SwAV and DeepCluster-v2: signs of a collapse, pictures, and what to run next."""

import argparse

from torch import nn

from shared.evaluation.knn_monitor import KNNMonitor
from shared.images.training_data import TrainingData
from shared.multicrop import MultiCropDataset
from shared.pictures.report import Plot, Report, accuracy_plot
from shared.run.health import HealthRule, equal_features, few_prototypes, patience, still_at_ln_k, uniform_codes
from shared.run.run import Run
from shared.run.settings import long_freeze, long_warmup, more_than_data, tell_settings

SCRIPTS = {"SwAV": "swav/main_swav.py", "DeepCluster-v2": "swav/main_deepclusterv2.py"}
ADVICE = {  # flags to try, by kind of failure
    "SwAV": {
        "uniform": "lower --epsilon (0.03), or take more --nmb_prototypes than --feat_dim",
        "few": "lengthen --freeze_prototypes_niters, lower --base_lr, or take fewer --nmb_prototypes or a longer "
        "--queue_length for a small batch",
        "features": "lower --base_lr, or lengthen --warmup_epochs and --freeze_prototypes_niters",
        "flat": "lower --epsilon (0.03), take more --nmb_prototypes than --feat_dim, fewer or larger crops, or "
        "lengthen --freeze_prototypes_niters",
    },
    "DeepCluster-v2": {
        "few": "lower --base_lr, or take fewer --nmb_prototypes",
        "features": "lower --base_lr, or lengthen --warmup_epochs",
        "flat": "take fewer --nmb_prototypes, fewer or larger crops, or a higher --base_lr",
    },
}


def curves(method: str) -> tuple[Plot, ...]:
    """What is drawn of the log; DeepCluster-v2 has clusters, no codes."""
    prediction = {"loss": "loss"} | ({"code_entropy": "entropy of the codes"} if method == "SwAV" else {})
    usage = {"prototypes_used": "used in the epoch so far", "prototype_perplexity": "perplexity"}
    return (
        Plot("Prediction of the codes", "nats", prediction, reference=("ln_k", "ln K: knows nothing")),
        Plot("Prototypes", "number", usage),
        accuracy_plot("Weighted k-NN of the features"),
    )


def health_rules(method: str, nmb_prototypes: int, epochs: int, steps_per_epoch: int) -> list[HealthRule]:
    """Signs of a collapse in the lines of the log; ``nmb_prototypes`` is K, for several sets that of the smallest."""
    first_step, advice = patience(epochs, steps_per_epoch), ADVICE[method]
    rules = [
        few_prototypes(nmb_prototypes, advice["few"], first_step),
        equal_features("embedding", advice["features"], first_step),
        still_at_ln_k("loss", "a network that knows nothing about the other view's code", advice["flat"], first_step),
    ]
    if method == "SwAV":
        rules.insert(0, uniform_codes(advice["uniform"], first_step))
    return rules


def suit_settings(args: argparse.Namespace, data: TrainingData, total_steps: int) -> None:
    """Name or change settings that make no sense for so few images and steps."""
    images = len(data.dataset)
    advice = [
        long_warmup("--warmup_epochs", args.warmup_epochs, args.epochs),
        more_than_data("--nmb_prototypes", args.nmb_prototypes, images),
    ]
    if "queue_length" in args:  # SwAV; the queue holds whole steps, and images only once
        queue = images // 2 // data.batch_size * data.batch_size
        advice += [
            long_freeze("--freeze_prototypes_niters", args.freeze_prototypes_niters, total_steps),
            more_than_data("--queue_length", args.queue_length, images, take=queue),
        ]
    tell_settings(args, *advice)


def report(method: str, run: Run, dataset: MultiCropDataset, trunk: nn.Module, knn: KNNMonitor) -> None:
    """Draw the training set's views, neighbours and curves, and print the text; every rank must call this."""
    ending = Report(run, SCRIPTS[method])
    titles = [f"crop {n}, {{px}} px" for n in range(len(dataset.recipes))]
    heading = "One image as it enters the network\nEvery crop predicts the codes of the others."
    ending.draw_views(dataset, titles, heading)
    ending.draw_neighbours(trunk, dataset.source, knn)
    ending.draw_curves(f"{method} training", curves(method))

    used = [
        f"{line['prototypes_used']:.0f} prototypes used by the {line['assigned']:.0f} assignments of the last epoch "
        f"(perplexity {line['prototype_perplexity']:.1f})"
        for line in ending.lines
        if "loss" in line
    ]
    # the checkpoint states architecture and image size
    clusters = {"split": "train" if run.args.data_path else None, "output_dir": run.output_dir / "clusters"}
    ending.then("swav/clusters.py", pretrained=run.path, **clusters)
    if knn.sources:
        linear = {"num_labels": len(knn.sources[1].classes), "dump_path": run.output_dir / "linear"}
        ending.then("swav/eval_linear.py", pretrained=run.path, **linear)
    ending.finish(used[-1:], knn, lr_flag="--base_lr")
