"""End-of-run report: curves, accuracy over cost, and what to run next."""

from flexivit.flexible_vit import FlexiViT
from shared.pictures.report import SUPERVISED_PLOTS, Report
from shared.run.run import Run
from shared.supervised.data import LabelledImages

from .eval_flexivit import measure, save_cost


def report(run: Run, network: FlexiViT, images: LabelledImages) -> None:
    """Evaluate the network at every patch size of the training, draw, and print the text."""
    args, ending = run.args, Report(run, "flexivit/main.py")
    ending.draw_curves("FlexiViT, supervised training", SUPERVISED_PLOTS)
    sizes = sorted({args.input_size // grid for grid in args.grids})
    rows = measure(network, args.input_size, sizes, images.evaluate, len(images.val))
    ending.draw("cost.png", lambda path: save_cost(rows, path, "Accuracy and cost of one FlexiViT"))
    by_size = ", ".join(f"{row['patch_size']} px {row['acc1']:.1f} %" for row in rows)
    ending.then("flexivit/eval_flexivit.py", pretrained=run.path, output_dir=run.output_dir / "cost")
    ending.then("flexivit/resize_patch.py", str(run.path), str(run.output_dir / "patch.pth"), patch=sizes[-1])
    ending.finish([*ending.top1(images.train, images.val), f"top-1 by patch size: {by_size}"])
