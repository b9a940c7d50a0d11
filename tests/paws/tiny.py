"""The smallest runs of PAWS, on generated images of which few have a label."""

from pathlib import Path

import numpy as np
from PIL import Image

from paws import paws_train
from shared.run.checkpoint import load_latest
from shared.run.log import read_log
from tests.tiny_training import Training

COMMON = (
    "--dataset digits --image_size 12 --model_name wide_resnet10w1 --output_dim 16 --supervised_imgs_per_class 2 "
    "--lr 0.5 --start_lr 0.1 --final_lr 0.01 --warmup 0 --device cpu --num_workers 0 --eval_knn_freq 0 --pictures off"
)
VIEWS = "--small_image_size 8 --multicrop 1 --use_pred_head true"

# --- For the suites that kill, launch and compare runs ----------------------------------------------------------------

FLAGS = (
    f"{COMMON} --unsupervised_batch_size 4 --labels_per_class 4 --epochs 2 --log_freq 2 --checkpoint_freq 1 "
    "--saveckp_steps 1"
).split()
PAIR = ("--unsupervised_batch_size", "2")
UNIQUE_CLASSES = (*PAIR, "--unique_classes_per_rank", "true", "--classes_per_batch", "1")
SMALL_NETWORK = ("wide_resnet10w1", {})
TRAININGS = {
    "paws": Training(
        "paws.paws_train",
        (*FLAGS, *VIEWS.split()),
        pair=PAIR,
        rounding=0.01,
        launcher=("paws.main_distributed", "main"),
        job=("--epochs", "20", "--checkpoint_freq", "0"),
    ),
    "paws_unique_classes": Training("paws.paws_train", (*FLAGS, *VIEWS.split()), pair=UNIQUE_CLASSES),
    "suncet": Training("paws.suncet_train", (*FLAGS, "--supervised_epochs", "1"), pair=PAIR),
}

# --- For tests in this process ----------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[2]
SUNCET = f"{COMMON} --unsupervised_batch_size 8 --epochs 1 --log_freq 1".split()
TINY = [*SUNCET, *VIEWS.split()]


def write_own_pictures(folder: Path, labelled: int = 12, unlabelled: int = 20) -> tuple[Path, Path]:
    """What a user may have: a flat folder of pictures of two kinds, bright and dark ones, and a table of few labels."""
    rng = np.random.default_rng(1)
    pictures = folder / "pictures"
    pictures.mkdir(parents=True)
    rows = ["image,label"]
    for i in range(labelled + unlabelled):
        low = 128 * (i % 2)
        Image.fromarray(rng.integers(low, low + 100, (20, 20, 3), dtype=np.uint8)).save(pictures / f"{i}.png")
        if i < labelled:
            rows.append(f"{i}.png,{('dark', 'bright')[i % 2]}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    return pictures, folder / "labels.csv"


def train(output_dir, *flags) -> list[dict]:
    """Lines of the log of a PAWS training."""
    arguments = [*TINY, "--output_dir", str(output_dir), *map(str, flags)]
    paws_train.train_paws(paws_train.parse_args(arguments))
    return lines(output_dir)


def lines(output_dir, log: str = "metrics") -> list[dict]:
    return read_log(Path(output_dir) / f"{log}.jsonl")


def losses(output_dir) -> list[float]:
    return [line["loss"] for line in lines(output_dir) if "loss" in line]


def state_of(output_dir, name: str = "paws-latest.pth.tar") -> dict:
    return load_latest(Path(output_dir) / name)


def comparable(state: dict) -> dict:
    """A checkpoint without what a clock or another command line changes."""
    state["log"].pop("lengths")
    return {key: value for key, value in state.items() if key != "args"}
