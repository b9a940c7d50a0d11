"""Train XCiT as a job on a SLURM cluster, with the flags of ``main.py`` and those of the job.

    python run_with_submitit.py --nodes 1 --ngpus 8 --partition gpu --model xcit_small_12_p16 --batch-size 128 \\
        --drop-path 0.05 --data-path /path/to/imagenet --output_dir /path/to/runs/%j

The job requeues itself when it is preempted or reaches its time limit, and resumes where it stopped. ``--cluster
local`` runs the same processes on this machine, ``--cluster debug`` trains in this process.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shared.launch import slurm
from xcit import main as training


def main(arguments: list[str] | None = None) -> None:
    slurm.submit_training(training, training.train_xcit, __doc__, "xcit", arguments)


if __name__ == "__main__":
    main()
