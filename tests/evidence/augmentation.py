"""The fast augmentation learns like the exact PIL chain: DINO on CIFAR-10 with either, everything else equal.

    python -m tests.evidence.augmentation --cifar10 DIR        # DIR holds train/ and test/ with class folders

Every run uses one thread; --parallel of them run at a time. Numbers are those of the last epoch, mean and standard
deviation over the seeds.
"""

from pathlib import Path

from tests.evidence.dino import CIFAR10
from tests.evidence.runs import Variant, main, run_all, table, write


def cifar10(out: Path, parallel: int, seeds: tuple[int, ...], train: Path, test: Path) -> None:
    recipe = f"{CIFAR10} --epochs 2 --data_path {train} --val_path {test}"
    variants = [Variant(chain, f"{recipe} --augmentation {chain}") for chain in ("fast", "pil")]
    results = run_all("dino", variants, out, parallel, seeds)
    columns = {"knn_before": "k-NN before", "knn_last": "k-NN after", "kl": "KL", "feature_spread": "feature spread"}
    write(out, "augmentation_cifar10", results, table(results, columns))


if __name__ == "__main__":
    main(__doc__, "augmentation", lambda *_: None, cifar10)
