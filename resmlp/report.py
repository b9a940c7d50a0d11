"""End-of-run report: curves and cross-patch layers, and what to run next."""

from torch import nn

from shared.pictures.report import SUPERVISED_PLOTS, Report
from shared.run.run import Run
from shared.run.summary import accuracy, command, next_command, start_of
from shared.supervised.data import LabelledImages

from .resmlp_models import ARCHITECTURES, ResMLP
from .visualize_cross_patch import save_layers, save_locality


def report(run: Run, network: nn.Module, images: LabelledImages, best_acc1: float) -> None:
    """Draw curves and cross-patch layers, and print the text; ``best_acc1`` is that of ``best_checkpoint.pth``."""
    args, ending = run.args, Report(run)
    ending.draw_curves("ResMLP, supervised training", SUPERVISED_PLOTS)
    if isinstance(network, ResMLP):
        ending.draw("layers.png", lambda path: save_layers(network, path.parent))
        ending.draw("locality.png", lambda path: save_locality(network, path))

    commands, val = [], images.val
    if args.model in ARCHITECTURES:
        weights, folder = {"pretrained_weights": run.path}, run.output_dir / "export"
        if not args.data_set.startswith(("CIFAR", "INAT")):  # of which k-NN reads class folders only
            neighbours = min(20, len(images.train))
            commands.append(next_command(args, "resmlp/main.py", "resmlp/eval_knn.py", **weights, nb_knn=neighbours))
        commands.append(command("resmlp/export.py", **weights, output_dir=folder))
    own_images = command("resmlp/main.py", data_path="YOUR_IMAGES", output_dir="YOUR_RUN")
    start = start_of(vars(args))
    what = f"top-1 on {val.describe()}"
    learned = accuracy(ending.lines, "test_acc1", what, len(val), len(val.classes), start=start)
    ending.finish(commands, own_images, [*learned, f"best top-1 {best_acc1:.1f} %"])
