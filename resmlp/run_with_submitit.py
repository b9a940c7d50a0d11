"""Train ResMLP as a job on a SLURM cluster, with the flags of ``main.py`` and those of the job.

    python run_with_submitit.py --nodes 2 --ngpus 8 --partition gpu --model resmlp_24 \\
        --data_path /path/to/imagenet --output_dir /path/to/runs/%j
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from resmlp.main import train_resmlp
from shared.launch import slurm

main = slurm.submitter(train_resmlp, __doc__)

if __name__ == "__main__":
    main()
