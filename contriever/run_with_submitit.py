"""Train Contriever as a job on a SLURM cluster, with the flags of ``train.py`` and those of the job.

    python run_with_submitit.py --nodes 4 --ngpus 8 --partition gpu --train_data encoded/wiki encoded/cc \\
        --output_dir /path/to/runs/%j

The job requeues itself when it is preempted or reaches its time limit, and resumes where it stopped. ``--cluster
local`` runs the same processes on this machine, ``--cluster debug`` trains in this process.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from contriever.train import get_args_parser, parse_args, train_contriever
from shared import distributed
from shared.launch import slurm


def main(arguments: list[str] | None = None) -> None:
    parser = get_args_parser()
    parser.description = __doc__.split("\n\n")[0]
    slurm.add_slurm_flags(parser, job_name="contriever")
    with distributed.clean_exit():
        slurm.submit(train_contriever, parse_args(arguments, parser))


if __name__ == "__main__":
    main()
