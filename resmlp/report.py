"""End-of-run report: curves and cross-patch layers, and what to run next."""

from torch import nn

from shared.pictures.report import SUPERVISED_PLOTS, Report
from shared.run.run import Run
from shared.supervised.data import LabelledImages

from .resmlp_models import ARCHITECTURES, ResMLP
from .visualize_cross_patch import save_layers, save_locality


def report(run: Run, network: nn.Module, images: LabelledImages, best_acc1: float) -> None:
    """Draw curves and cross-patch layers, and print the text; ``best_acc1`` is that of ``best_checkpoint.pth``."""
    args, ending = run.args, Report(run, "resmlp/main.py")
    ending.draw_curves("ResMLP, supervised training", SUPERVISED_PLOTS)
    if isinstance(network, ResMLP):
        ending.draw("layers.png", lambda path: save_layers(network, path.parent))
        ending.draw("locality.png", lambda path: save_locality(network, path))

    if args.model in ARCHITECTURES:
        weights, folder = {"pretrained_weights": run.path}, run.output_dir / "export"
        if not args.data_set.startswith(("CIFAR", "INAT")):  # of which k-NN reads class folders only
            ending.then("resmlp/eval_knn.py", **weights, nb_knn=min(20, len(images.train)))
        ending.then("resmlp/export.py", **weights, output_dir=folder)
    ending.finish([*ending.top1(images.train, images.val), f"best top-1 {best_acc1:.1f} %"])
