"""Flags of the programs, with the names and the sections of the released configuration files.

Every function adds a group and returns its ``add_argument``, with which a program adds its own flags to the group.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

from shared.evaluation.flags import add_shared_classes_flag, take_from_run
from shared.networks.pretrained import flags_of_run, image_size_of
from shared.optimisation.accumulation import add_accumulation_flag
from shared.run import flags as common
from shared.run.flags import AnyDashParser, bool_flag
from shared.run.yaml_config import parse_args_with_config, read_config

from .augmentations import RECIPES, Recipe, choose_recipe
from .hub import CARD

WEIGHTS = "a checkpoint of main.py, or the name of a release"
RANGES = (  # what is expected of flags
    ("at least 1", lambda value: value >= 1, "epochs unsupervised_batch_size supervised_views supervised_batch_size"),
    ("at least 1", lambda value: value >= 1, "batch_size log_freq repeat"),
    ("at least 0", lambda value: value >= 0, "output_dim warmup saveckp_steps saveckp_minutes max_skipped_steps"),
    ("a positive number", lambda value: value > 0, "temperature sharpen lr"),
    ("a share of at least 0 and less than 1", lambda value: 0 <= value < 1, "label_smoothing"),
    ("a share of less than 1", lambda value: value < 1, "unlabeled_frac"),
    ("a probability", lambda value: 0 <= value <= 1, "min_confidence"),
)
ON_EMBEDDED = {  # without images: the embedded ones, and the network that main.py trains on them
    "labels_per_class": 4,
    "dataset": "cifar10",  # images of the same size
    "model_name": "wide_resnet10w1",
    "pretrained": CARD.embedded_run,
}
DATASETS = (*RECIPES, "imagenet_fine_tune", "cifar10_fine_tune")


def new_parser(docstring: str) -> argparse.ArgumentParser:
    """A parser with ``--fname``; its description is the first paragraph of the docstring."""
    parser = AnyDashParser(docstring, conflict_handler="resolve")  # some flags get another section or help below
    parser.add_argument("--fname", default=None, help="YAML file with values for these flags; the command line wins")
    return parser


def add_label_flags(parser: argparse.ArgumentParser, dataset: str | None = "imagenet") -> Callable:
    """Where the images and their labels come from, and how they are seen; ``dataset``: see :func:`recipe_of_run`."""
    add = common.add_data_flags(parser)
    add("--root_path", default=None, help="official name of --data_path, together with --image_folder")
    add("--image_folder", default="", help="folder below --root_path")
    add("--labels", nargs="+", default=None, help="CSV files: image, label; also the pseudo_labels.csv of a run")
    add("--min_confidence", type=float, default=None, help="use only pseudo-labels of this confidence or more")
    add("--labels_per_class", type=int, default=None, help="draw so many labelled images of every class")
    add("--unlabeled_frac", type=float, default=0.9, help="share of labels not to use, where nothing else says which")
    add("--subset_path", default=None, help="list of the labelled images, or the folder with the official lists")
    add("--data_seed", type=int, default=None, help="number of the official CIFAR-10 list; seed of drawn labels")
    add("--dataset", default=dataset, choices=DATASETS, help="recipe of the views; None: that of the training")
    add("--normalize", type=bool_flag, default=True, help="subtract the mean of the channels, divide by their spread")
    add("--image_size", type=int, default=None, help="side of the large views in pixels; by default the recipe's")
    return add


def pretraining_parser(docstring: str, write_tag: str) -> argparse.ArgumentParser:
    """The flags that PAWS and SuNCEt have in common."""
    parser = new_parser(docstring)
    add = add_label_flags(parser)
    add("--color_jitter_strength", type=float, default=1.0, help="factor of brightness, contrast, saturation and hue")
    add("--multicrop", type=int, default=6, help="small views of every unlabelled image")
    add("--small_image_size", type=int, default=None, help="side of the small views in pixels; by default the recipe's")
    add("--augmentation", default="fast", choices=("fast", "pil"), help="pil: the slow exact reference chain")
    add("--label_smoothing", type=float, default=0.1, help="of the labels of the supports")
    add("--unique_classes_per_rank", type=bool_flag, default=False, help="processes have supports of different classes")

    add = parser.add_argument_group("criterion").add_argument
    classes = "classes among the supports of a process; None: all, with --unique_classes_per_rank its share of them"
    add("--classes_per_batch", type=int, default=None, help=classes)
    images = "supports of a class on a process; None: as many as the class with the fewest labels allows, at most 16"
    add("--supervised_imgs_per_class", type=int, default=None, help=images)
    add("--supervised_views", type=int, default=1, help="views of every support")
    add("--unsupervised_batch_size", type=int, default=64, help="unlabelled images per process")
    add("--temperature", type=float, default=0.1, help="of the softmax over similarities")

    add = parser.add_argument_group("meta").add_argument
    names = "resnet50, 101, 152, 200, with w2 or w4 for wider ones, wide_resnet28w2, or a torchvision or timm model"
    add("--model_name", default="resnet50", help=names)
    add("--output_dim", type=int, default=2048, help="dimension of the representations")
    add("--use_pred_head", type=bool_flag, default=False, help="a prediction head for the anchors")
    add("--compile", action="store_true", help="torch.compile the network without its heads")
    add_accumulation_flag(add)
    add("--pretrained", default=None, help="start from this file, of any layout, or release; by default random weights")
    add("--allow_partial", action="store_true", help="go on when --pretrained does not fill the backbone")
    add("--read_checkpoint", default=None, help="file in the output folder to go on from while the run has none")

    add_optimisation_flags(parser)
    add_run_flags(parser, write_tag)
    return parser


def add_optimisation_flags(parser: argparse.ArgumentParser) -> Callable:
    """LARS and its schedule."""
    add = parser.add_argument_group("optimization").add_argument
    add("--epochs", type=int, default=100, help="passes over the images, of a fine-tuning over those with a label")
    add("--lr", type=float, default=6.4, help="peak learning rate; it is not scaled with the batch")
    add("--start_lr", type=float, default=0.3, help="learning rate of the first step")
    add("--final_lr", type=float, default=0.064, help="learning rate at the end")
    add("--warmup", type=int, default=10, help="epochs of linear warm-up")
    add("--weight_decay", type=float, default=1e-6, help="of all but biases and batch norms")
    add("--momentum", type=float, default=0.9, help="of SGD")
    add("--nesterov", type=bool_flag, default=False, help="Nesterov's momentum")
    return add


def add_run_flags(parser: argparse.ArgumentParser, write_tag: str) -> None:
    """Output, checkpoints, evaluation, processes, precision."""
    add = common.add_run_flags(parser, knn=False)
    when = "soft nearest neighbours every so many epochs; 0: never; None: before and after, with at most 100,000 images"
    add("--eval_knn_freq", type=int, default=None, help=when)
    add("--checkpoint_freq", type=int, default=50, help="keep a checkpoint every so many epochs; 0: none")
    add("--seed", type=int, default=0, help="of the initial weights, the order of the images, the supports, the views")
    add_output_flags(parser, write_tag)
    add = add_device_flag(parser)
    add("--use_fp16", type=bool_flag, default=True, help="false: the same as --amp fp32")
    add("--amp", default="auto", choices=("auto", "bf16", "fp16", "fp32"), help="auto: bf16 where it is fast")
    add("--load_checkpoint", type=bool_flag, default=True, help="ignored: a run always goes on from its own checkpoint")


def add_device_flag(parser: argparse.ArgumentParser) -> Callable:
    """``--device`` in the section of the released files, which say ``cuda:0``, and what they say about copies."""
    add = parser.add_argument_group("meta").add_argument
    common.add_device_flag(add)
    add("--copy_data", type=bool_flag, default=False, help="ignored: --cache keeps decoded images near")
    return add


def add_evaluation_flags(parser: argparse.ArgumentParser, batch_size: int) -> Callable:
    """Classifier, encoder and processes of the programs that train nothing."""
    add = parser.add_argument_group("criterion").add_argument
    add("--temperature", type=float, default=0.1, help="of the softmax over similarities")
    add = parser.add_argument_group("processes").add_argument
    add("--dist_url", default="env://", help="rendezvous of the processes")
    add("--local_rank", type=int, default=0, help="ignored: read from the environment")
    add = add_device_flag(parser)
    add_network_flags(parser, "resnet50", "")
    add("--use_pred", action="store_true", help="compare the outputs of the prediction head")
    add("--batch_size", type=int, default=batch_size, help="images per process")
    return add


def add_fine_tuning_flags(parser: argparse.ArgumentParser, model_name: str, write_tag: str) -> Callable:
    """Encoder and output of both kinds of fine-tuning."""
    add_run_flags(parser, write_tag)
    add_shared_classes_flag(parser.add_argument_group("data").add_argument)
    add = parser.add_argument_group("logging").add_argument
    add("--pretrain_path", default=None, help="official name of --pretrained, relative to --output_dir")
    return add_network_flags(parser, model_name, ", or random (fine_tune.py)")


def add_network_flags(parser: argparse.ArgumentParser, model_name: str, others: str) -> Callable:
    """The network; :func:`recipe_of_run` fills in what is left to the training."""
    parser.set_defaults(model_of_others=model_name)
    add = parser.add_argument_group("meta").add_argument
    add("--model_name", default=None, help=f"as for main.py; None: that of the training, else {model_name}")
    add("--pretrained", default=None, help=f"run or checkpoint of a training, or the name of a release{others}")
    return add


def add_output_flags(parser: argparse.ArgumentParser, write_tag: str = "paws") -> None:
    """Where a program writes, and under which name."""
    add = parser.add_argument_group("logging").add_argument
    add("--folder", "--output_dir", default=".", dest="output_dir", help="checkpoints, logs and pictures")
    add("--write_tag", default=write_tag, help="checkpoints are called <tag>-latest.pth.tar")


def parse_with_embedded_defaults(
    parser: argparse.ArgumentParser, arguments: list[str] | None, embedded: dict, weights: str = ""
) -> argparse.Namespace:
    """Parse and check; without images ``embedded`` replaces the defaults, but not what the file of ``--fname`` says.

    Args:
        weights: What ``--pretrained`` has to name, if it must be given.
    """
    args = parse_args_with_config(parser, arguments)
    if args.data_path is None and args.root_path is None:
        parser.set_defaults(**{name: value for name, value in embedded.items() if hasattr(args, name)})
        args = parse_args_with_config(parser, arguments)
    if args.root_path is not None and args.data_path is None:
        args.data_path = str(args.root_path).rstrip("/") + "/" + args.image_folder.strip("/")
        if (args.dataset or "").startswith("cifar10"):
            parser.error(
                f"--root_path {args.root_path}: give CIFAR-10 as --data_path cifar10, or as a folder of images"
            )
    if getattr(args, "pretrain_path", None) is not None and args.pretrained is None:
        args.pretrained = str(Path(args.output_dir) / args.pretrain_path)
    if not getattr(args, "use_fp16", True):
        args.amp = "fp32"
    if weights and args.pretrained is None:
        parser.error(f"--pretrained is missing: {weights}")
    if "warmup" in args:
        stated = read_config(args.fname, parser) if args.fname else ()
        common.shorten_unset_warmup(parser, args, arguments, "warmup", stated=stated)
    check_ranges(parser, args)
    return args


def recipe_of_run(args: argparse.Namespace) -> Recipe:
    """The recipe of an evaluation: what the flags leave open is that of the training behind ``--pretrained``.

    That of another folder says how large its images were, and what its network is.
    """
    trained_with = flags_of_run(args.pretrained, CARD)
    args.dataset = args.dataset or trained_with.get("dataset") or "imagenet"
    seen = image_size_of(trained_with)
    if trained_with.get("dataset"):
        seen = choose_recipe(trained_with["dataset"], image_size=trained_with.get("image_size")).large[0]
    names = {"model_name": "model_name", "image_size": "image_size"}
    take_from_run(args, {**trained_with, "image_size": seen}, names, {"model_name": args.model_of_others})
    return choose_recipe(args.dataset, args.normalize, args.image_size)


def check_ranges(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End the program if a number is out of its range."""
    for expected, fits, names in RANGES:
        for name in names.split():
            value = getattr(args, name, None)
            if value is not None and not fits(value):
                parser.error(f"--{name} {value}: expected {expected}")
    if getattr(args, "epochs", 0) < getattr(args, "warmup", 0):
        parser.error(f"--epochs {args.epochs} is less than --warmup {args.warmup}")
