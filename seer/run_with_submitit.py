"""Train SEER as a job on a SLURM cluster, with the flags of ``main_seer.py`` and those of the job.

    python run_with_submitit.py --nodes 62 --ngpus 8 --partition gpu --fname configs/regnet10B.yaml \\
        --data_path /path/to/shards --output_dir /path/to/runs/%j
"""

import sys
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from seer import main_seer as training
from shared.launch import slurm

main = partial(slurm.submit_training, training, training.train_seer, __doc__)

if __name__ == "__main__":
    main()
