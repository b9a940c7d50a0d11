"""Low-shot classification: logistic regression on frozen features of 1, 2 or 5 images per class, or of 1 % of them.

    python logistic_eval.py                                  # embedded materials, weights of the run in runs/materials
    python logistic_eval.py --model-name deit_small --pretrained /path/to/weights --fname vits16_800ep.pth.tar \\
        --root-path /path/to --image-folder imagenet --subset-path imagenet_subsets1/1imgs_class.txt \\
        imagenet_subsets2/1imgs_class.txt imagenet_subsets3/1imgs_class.txt --lambd 0.0025    # ViT-S/16: 47.1 +- 0.1

An image's feature is the class token after the last block, before the final norm (Assran et al. 2022, section 5). The
result is the mean and the spread over the splits of labelled images: lists, or draws of --imgs_per_class.
"""

import argparse
import math
import statistics
import sys
import warnings
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import shared.run.passive_threads  # noqa: F401

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from msn.flags import add_data_flags, finish, load_frozen, network_parser
from msn.vision_transformer import VisionTransformer, num_kept_patches
from shared import distributed
from shared.evaluation import frozen
from shared.evaluation.features import extract_features
from shared.evaluation.flags import add_process_flags
from shared.images.loading import EvalDataset
from shared.images.sources import ImageSource
from shared.images.subsets import Subset, listed_images
from shared.networks.weights import safe_load, weights_checksum
from shared.run import randomness
from shared.run.checkpoint import save
from shared.run.flags import bool_flag

MAX_ITERATIONS = 20_000
TOLERANCE = 1e-8  # of the largest change of a weight, over the largest weight


def get_args_parser() -> argparse.ArgumentParser:
    parser = network_parser(__doc__)
    add_data_flags(parser)
    add = parser.add_argument_group("labels").add_argument
    lists = "a text file per split with names of labelled images, one a line (n01440764_10183.JPEG); default: all"
    add("--subset_path", "--subset-path", nargs="+", default=None, help=lists)
    add("--imgs_per_class", type=int, default=None, help="without lists: draw so many of each class")
    add("--splits", type=int, default=3, help="draws of --imgs_per_class")
    add("--seed", type=int, default=0, help="of these draws and of the masks")

    add = parser.add_argument_group("classifier").add_argument
    add("--lambd", type=float, default=0.00025, help="regularisation, divided by the number of labelled images")
    add("--penalty", default="l2", choices=("l2", "elastic-net"), help="regulariser")
    add("--mask", type=float, default=0.0, help="share of the patches of the labelled images that is not seen")
    add("--normalize", type=bool_flag, default=True, help="centre each feature vector and divide it by its norm")
    add("--preload", action="store_true", help="keep features in files beside the weights, and use them if they exist")
    add("--batch_size", type=int, default=16, help="images per process in one pass")
    add_process_flags(parser)
    return parser


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = get_args_parser()
    args = finish(parser, lambda: parser.parse_args(arguments), imgs_per_class=5, lambd=0.0025)
    if args.imgs_per_class is not None and min(args.imgs_per_class, args.splits) < 1:
        parser.error(f"--imgs_per_class {args.imgs_per_class} --splits {args.splits}: need at least 1")
    if not args.lambd > 0:
        parser.error(f"--lambd {args.lambd} is not positive")
    return args


def logistic_eval(args: argparse.Namespace) -> dict[str, float]:
    """Fit on every split and classify the val images; mean and spread of the top-1 accuracy in percent."""
    device = distributed.init(args.dist_url, args.device)
    encoder, transform = load_frozen(args)
    train, val = frozen.labelled_sources(args)
    splits = labelled_splits(train, args.subset_path, args.imgs_per_class, args.splits, args.seed)
    check_mask(args.mask, args.image_size, encoder.patch_embed.patch_size)
    encoder.to(device)
    checksum = weights_checksum(encoder)

    def embed(source: ImageSource, patch_drop: float, file: str) -> tuple[Tensor, Tensor]:
        path = Path(args.pretrained, file) if Path(args.pretrained).is_dir() else None
        if args.preload and path is None:
            raise ValueError(f"--preload: --pretrained {args.pretrained} is no folder to keep features in")
        made_with = {"weights": checksum, "image_size": args.image_size, "mask": patch_drop, "seed": args.seed}
        if args.preload and path.is_file():
            distributed.print_once(f"features from {path}")
            return read_features(path, source, made_with)
        randomness.seed_everything(args.seed)
        images = EvalDataset(source, transform, frozen.bad_images_of(args, source))
        tokens = LastClassToken(encoder, patch_drop)
        found = extract_features(tokens, images, device, args.batch_size, args.num_workers, "cpu")
        if args.preload and distributed.is_main_process():
            save(path, {"embs": found[0], "labs": found[1], "images": source.checksum(), "made_with": made_with})
        return found

    val_features, val_labels = embed(val, 0.0, f"val-features-{args.fname}")
    accuracies = []
    for split in splits:
        name = split.name.replace("/", "-").replace(" ", "-").removesuffix(".txt")
        features, labels = embed(split, args.mask, f"train-features-{name}-{args.fname}")
        classifier = LowShotClassifier(features, labels, args.lambd, args.penalty, args.normalize)
        train_acc, val_acc = classifier.accuracy(features, labels), classifier.accuracy(val_features, val_labels)
        distributed.print_once(f"{split.name}: {len(split)} images, train {train_acc:.3f} %, val {val_acc:.3f} %")
        accuracies.append(val_acc)
    spread = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
    result = {"acc1": statistics.mean(accuracies), "spread": spread}
    distributed.print_once(
        f"Top-1 accuracy over {len(splits)} split(s): {result['acc1']:.2f} +- {result['spread']:.2f} %"
    )
    return result


class LastClassToken(nn.Module):
    """What the classifier sees of an image: the class token after the last block, before the final norm."""

    def __init__(self, encoder: VisionTransformer, patch_drop: float = 0.0, num_blocks: int = 1):
        super().__init__()
        self.encoder, self.patch_drop, self.num_blocks = encoder, patch_drop, num_blocks

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, num_blocks * D)."""
        return self.encoder.forward_blocks(images, self.num_blocks, self.patch_drop)


def check_mask(mask: float, image_size: int, patch_size: int) -> None:
    """Raise ``ValueError`` for a --mask that leaves no patch."""
    try:
        num_kept_patches((image_size // patch_size) ** 2, mask)
    except ValueError as error:
        raise ValueError(f"--mask {mask}: {error}") from error


# --- Labelled images --------------------------------------------------------------------------------------------------


def labelled_splits(
    train: ImageSource, lists: list[str] | None, imgs_per_class: int | None, num_splits: int, seed: int
) -> list[Subset]:
    """The images whose labels may be seen, for each split; all of them where nothing else is said.

    Raises:
        ValueError: If a list does not fit the images, a class is missing from it, or has too few images.
    """
    if lists:
        splits = [Subset(train, listed_images(train, path, "--subset_path"), path) for path in lists]
        for split in splits:
            if missing := set(train.labels.tolist()) - set(split.labels.tolist()):
                names = ", ".join(train.classes[label] for label in sorted(missing)[:3])
                raise ValueError(f"--subset_path {split.name}: no image of {len(missing)} classes, such as {names}")
        return splits
    if imgs_per_class is None:
        return [Subset(train, np.arange(len(train)), "all images")]
    return [
        Subset(train, draw_per_class(train, imgs_per_class, seed, number), f"{imgs_per_class} per class, draw {number}")
        for number in range(num_splits)
    ]


def draw_per_class(train: ImageSource, imgs_per_class: int, seed: int, split: int) -> np.ndarray:
    """Indices of ``imgs_per_class`` images of every class, a function of (seed, split, class).

    Raises:
        ValueError: If a class has fewer.
    """
    chosen = []
    for label in np.unique(train.labels):
        (members,) = np.nonzero(train.labels == label)
        if len(members) < imgs_per_class:
            raise ValueError(
                f"--imgs_per_class {imgs_per_class}: class {train.classes[label]} has only {len(members)} images"
            )
        generator = np.random.default_rng(randomness.derive_seed(seed, split, int(label)))
        chosen.append(generator.permutation(members)[:imgs_per_class])
    return np.sort(np.concatenate(chosen))


def read_features(path: Path, source: ImageSource, made_with: dict | None = None) -> tuple[Tensor, Tensor]:
    """Features and labels of a file of ``--preload``, or of one that the official script wrote.

    Args:
        made_with: Weights and flags that the features depend on; official files do not say theirs.

    Raises:
        ValueError: If they are not those of ``source``, or were made in another way.
    """
    saved = safe_load(path)
    features, labels = (torch.as_tensor(saved.get(name, torch.empty(0))) for name in ("embs", "labs"))
    # where an image could not be read, the label is that of the one in its place
    is_same = saved["images"] == source.checksum() if "images" in saved else np.array_equal(labels, source.labels)
    if len(features) != len(source) or not is_same:
        raise ValueError(f"--preload: {path} holds the features of other images than {source.name}; remove it")
    if made_with is not None and saved.get("made_with", made_with) != made_with:
        changed = ", ".join(name for name, value in made_with.items() if saved["made_with"].get(name) != value)
        raise ValueError(f"--preload: {path} holds features that were made with other values of {changed}; remove it")
    return features.float(), labels.long()


# --- Classifier -------------------------------------------------------------------------------------------------------


def preprocess(features: np.ndarray) -> np.ndarray:
    """Subtract from every row of (N, D) its own mean over the dimensions, and divide it by its norm."""
    centred = features - features.mean(axis=1, keepdims=True)
    return centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)


def ridge_regression(features: np.ndarray, labels: np.ndarray, lambd: float) -> tuple[np.ndarray, bool]:
    """Weights that minimise ``sum CE + lambd / 2 |W|^2``, and whether they were found.

    Args:
        features: Shape (n, D).
        labels: 0 to K - 1.

    Returns:
        Shape (D, K).
    """
    # for two classes scikit-learn has a single vector, the difference of the two, which costs half as much
    two = labels.max() == 1
    regression = LogisticRegression(C=(2 if two else 1) / lambd, fit_intercept=False, tol=1e-6, max_iter=MAX_ITERATIONS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        weights = regression.fit(features, labels).coef_.T
    converged = not any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
    return np.concatenate([-weights / 2, weights / 2], axis=1) if two else weights, converged


def elastic_net_regression(features: np.ndarray, labels: np.ndarray, lambd: float) -> tuple[np.ndarray, bool]:
    """The same for ``sum CE + lambd / 2 |W|^2 + lambd |W|_1``.

    Proximal gradient steps with a momentum that starts again where it leads astray (FISTA, Beck and Teboulle 2009;
    O'Donoghue and Candes 2015): on few images in many dimensions they take a tenth of the time of scikit-learn's saga.
    """
    x, one_hot = torch.from_numpy(features), torch.eye(labels.max() + 1, dtype=torch.double)[labels]
    step_size = 1 / (torch.linalg.matrix_norm(x, 2).item() ** 2 / 2 + lambd)  # 1 / the largest curvature
    weights = ahead = torch.zeros(x.shape[1], one_hot.shape[1], dtype=torch.double)
    momentum = 1.0
    for _ in range(MAX_ITERATIONS):
        gradient = x.T @ ((x @ ahead).softmax(dim=1) - one_hot) + lambd * ahead
        new = F.softshrink(ahead - step_size * gradient, step_size * lambd)
        if ((ahead - new) * (new - weights)).sum() > 0:
            momentum = 1.0
        next_momentum = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
        ahead = new + (momentum - 1) / next_momentum * (new - weights)
        change, weights, momentum = (new - weights).abs().max(), new, next_momentum
        if change <= TOLERANCE * weights.abs().max():
            return weights.numpy(), True
    return weights.numpy(), False


class LowShotClassifier:
    """Multinomial logistic regression without intercept, fitted to features (n, D) with labels (n,).

    The objective is n times the published one, whose weights are divided by the number n of images.

    Attributes:
        weights: Shape (D, classes).

    Raises:
        ValueError: If there is only one class.
    """

    def __init__(self, features: Tensor, labels: Tensor, lambd: float, penalty: str = "l2", normalize: bool = True):
        self.classes, indices = np.unique(labels.numpy(), return_inverse=True)
        if len(self.classes) < 2:
            raise ValueError("the labelled images have a single class; at least two are needed")
        self.prepare = preprocess if normalize else np.asarray
        fit = ridge_regression if penalty == "l2" else elastic_net_regression
        self.weights, converged = fit(self.prepare(features.double().numpy()), indices, lambd)
        if not converged:
            distributed.print_once(f"--lambd {lambd}: not converged after {MAX_ITERATIONS} iterations")

    def accuracy(self, features: Tensor, labels: Tensor) -> float:
        """Top-1 in percent."""
        scores = self.prepare(features.double().numpy()) @ self.weights
        return 100 * float(np.mean(self.classes[scores.argmax(axis=1)] == labels.numpy()))


def main() -> None:
    distributed.run_script(logistic_eval, parse_args)


if __name__ == "__main__":
    main()
