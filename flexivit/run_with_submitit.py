"""Train FlexiViT as a job on a SLURM cluster, with the flags of ``main.py`` and those of the job.

    python run_with_submitit.py --nodes 2 --ngpus 8 --partition gpu --arch flexivit_b \\
        --data_path /path/to/imagenet --output_dir /path/to/runs/%j
"""

import sys
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from flexivit import main as training
from shared.launch import slurm

main = partial(slurm.submit_training, training, training.train_flexivit, __doc__)

if __name__ == "__main__":
    main()
