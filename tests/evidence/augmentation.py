"""The fast augmentation learns like the exact PIL chain: DINO on CIFAR-10 with either, everything else equal.

    python tests/evidence/augmentation.py --cifar10 DIR        # DIR holds train/ and test/ with class folders

Every run uses one thread; --parallel of them run at a time. Numbers are those of the last epoch, mean and standard
deviation over the seeds.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.evidence.dino import CIFAR10
from tests.evidence.runs import SEEDS, Variant, cifar10_images, run_all, table, write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build/evidence/augmentation")
    parser.add_argument("--cifar10", type=Path, required=True, help="folder with train/ and test/")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    args = parser.parse_args()
    out = args.out.absolute()
    train, test = cifar10_images(args.cifar10.absolute(), out)
    images = f"--data_path {train} --val_path {test}"
    recipe = f"{CIFAR10} --epochs {args.epochs}"
    variants = [Variant(chain, f"{recipe} --augmentation {chain} {images}") for chain in ("fast", "pil")]
    results = run_all("dino", variants, out, args.parallel, tuple(args.seeds))
    columns = {"knn_before": "k-NN before", "knn_last": "k-NN after", "kl": "KL", "feature_spread": "feature spread"}
    write(out, "augmentation_cifar10", results, table(results, columns))


if __name__ == "__main__":
    main()
