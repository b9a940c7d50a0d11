"""Train SwAV or DeepCluster-v2 as a job on a SLURM cluster, with the flags of the training and those of the job.

    python run_with_submitit.py --nodes 8 --ngpus 8 --partition gpu --data_path /path/to/imagenet/train \\
        --dump_path /path/to/runs/%j
    python run_with_submitit.py --method deepclusterv2 --nodes 8 --ngpus 8 ...
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shared import distributed
from shared.launch import slurm
from shared.run.flags import Parser
from swav import main_deepclusterv2, main_swav

METHODS = {
    "swav": (main_swav, main_swav.train_swav),
    "deepclusterv2": (main_deepclusterv2, main_deepclusterv2.train_deepclusterv2),
}


def get_args_parser(method: str = "swav") -> argparse.ArgumentParser:
    parser = METHODS[method][0].get_args_parser()
    parser.add_argument("--method", default=method, choices=METHODS, help="what to train")
    return parser


def main(arguments: list[str] | None = None) -> None:
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--method", default="swav", choices=METHODS)
    method = first.parse_known_args(arguments)[0].method
    script, train = METHODS[method]
    with distributed.clean_exit():
        args = script.parse_args(arguments, slurm.launcher_parser(get_args_parser(method), __doc__, method))
        if args.method != method:
            raise ValueError("--method cannot be abbreviated")
        del args.method  # a flag of this script, not of the training
        slurm.submit(train, args)


if __name__ == "__main__":
    main()
