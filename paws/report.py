"""End-of-run report: signs of a collapse, pictures, and what to run next."""

import math
from collections.abc import Sequence

import numpy as np

from shared.multicrop import MultiCropDataset
from shared.pictures.report import Plot, Report, accuracy_plot
from shared.run.health import HealthRule, equal_features
from shared.run.run import Run
from shared.run.summary import accuracy, command, from_here, start_of, without_labels

from .evaluation import SNNMonitor
from .pseudo_labels import save_certainty

LOSS = {"ploss": "cross-entropy of two views", "mean_entropy": "entropy of the mean prediction"}
SNN = accuracy_plot("Soft nearest neighbours", "snn_top1")
PLOTS = {
    "PAWS": (
        Plot("Pseudo-labels", "nats", LOSS, reference=("ln_k", "ln K: all classes alike")),
        Plot("Certainty", "largest probability", {"certainty": "mean, sharpened"}, least_range=0.2),
        SNN,
    ),
    "SuNCEt": (Plot("Losses", "nats", {"simclr": "of two views", "suncet": "of labelled images"}), SNN),
}
OWN_IMAGES = "paws/configs/paws/own_images.yaml"


def health_rules(num_classes: int, total_steps: int) -> list[HealthRule]:
    """Signs of a collapse of the pseudo-labels, of K = ``num_classes``, in the lines of the log.

    The first verdict comes after a quarter of the run: random networks look flat.
    """
    first_step = total_steps // 4
    return [
        equal_features("representation", "lower --lr or lengthen --warmup", first_step),
        HealthRule(
            "few",
            lambda line: math.exp(line["mean_entropy"]) < 0.3 * num_classes,
            f"COLLAPSE: the pseudo-labels use few of the {num_classes} classes (entropy of their mean "
            "{mean_entropy:.2f}, of all classes {ln_k:.2f}): use --me_max true, lower --lr, or take more supports "
            "(--supervised_imgs_per_class, --supervised_views)",
            first_step,
        ),
        HealthRule(
            "uncertain",
            lambda line: line["certainty"] < 1.5 / num_classes,
            "COLLAPSE: the pseudo-labels are nearly uniform (largest probability {certainty:.3f}): lower --sharpen "
            "or --temperature, or lengthen --warmup",
            first_step,
        ),
    ]


def report(
    run: Run,
    dataset: MultiCropDataset,
    evaluation: SNNMonitor,
    lines: Sequence[str] = (),
    pseudo_labels: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None,
    method: str = "PAWS",
) -> None:
    """Draw the pseudo-labels, views and curves, and print the text.

    Args:
        dataset: The unlabelled training images.
        lines: About the pseudo-labels.
        pseudo_labels: As :func:`paws.pseudo_labels.save_pseudo_labels` returns them.
    """
    images, args, script = evaluation.classifier.images, run.args, f"paws/{method.lower()}_train.py"
    ending = Report(run, script)
    if pseudo_labels:
        ending.draw("certainty.png", lambda path: save_certainty(images, *pseudo_labels, path))
    titles = ["large view {n}"] * 2 + ["small view {n}"] * (len(dataset.recipes) - 2)
    alike = "get the same pseudo-label" if method == "PAWS" else "be alike, and those of a class with labels"
    heading = f"One image as it enters the network\nAll views have to {alike}."
    ending.draw_views(dataset, titles, heading)
    ending.draw_curves(f"{method} training", PLOTS[method])

    network = {"pretrained": run.path, "model_name": args.model_name}
    start = start_of(vars(args))
    if evaluation.disabled_reason:
        learned = [f"accuracy not known: {evaluation.disabled_reason}"]
    else:
        validation = evaluation.validation
        what = f"soft nearest neighbours, {len(images.labelled):,} labels, {validation.describe()}"
        sizes = len(validation.rows), len(images.classes)
        learned = accuracy(ending.lines, "snn_top1", what, *sizes, start=start)
        ending.then("paws/snn_eval.py", **network)
        ending.then("paws/fine_tune.py", **network, output_dir=run.output_dir / "fine-tune")
    if measures := evaluation.without_labels:
        learned += without_labels(ending.lines, measures.name, len(measures.images), start=start)
    own = {"data_path": "YOUR_IMAGES", "labels": "YOUR_LABELS.csv"}
    if method == "PAWS":
        script, own = "paws/main.py", own | {"fname": from_here(OWN_IMAGES)}
    ending.finish([*learned, *lines], own_images=command(script, **own, output_dir="YOUR_RUN"))
