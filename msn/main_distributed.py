"""Train MSN, or its linear evaluation, as a job on a SLURM cluster, with the flags of the training and of the job.

    python main_distributed.py --fname configs/pretrain/msn_vits16.yaml --nodes 2 --tasks-per-node 8 --partition gpu \\
        --time 4300 --folder /path/to/job_logs --data_path /path/to/imagenet/train --output_dir /path/to/runs/%j
    python main_distributed.py --linear-eval --fname configs/eval/lineval_msn_vits16.yaml ...

As in the official script --folder is where submitit writes its logs; the output of the training is --output_dir, or
``logging.folder`` of the YAML file.
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from msn import linear_eval
from msn import main as pretraining
from shared import distributed
from shared.launch import slurm


def get_args_parser(linear: bool = False) -> argparse.ArgumentParser:
    defaults = {"nodes": 1, "ngpus": 1, "timeout": 4300, "mem_gb_per_gpu": 55}
    parser = (linear_eval if linear else pretraining).get_args_parser()
    slurm.launcher_parser(parser, __doc__, "msn-linear" if linear else "msn", **defaults)
    parser.add_argument("--linear-eval", action="store_true", help="linear evaluation instead of the training")
    return parser


def main(arguments: list[str] | None = None) -> None:
    arguments = slurm.with_our_names(arguments)
    linear = "--linear-eval" in arguments
    script, train = (linear_eval, linear_eval.linear_eval) if linear else (pretraining, pretraining.train_msn)
    with distributed.clean_exit():
        args = script.parse_args(arguments, get_args_parser(linear))
        if args.linear_eval != linear:
            raise ValueError("--linear-eval cannot be abbreviated")
        del args.linear_eval  # a flag of this script, not of the training
        slurm.submit(train, args)


if __name__ == "__main__":
    main()
