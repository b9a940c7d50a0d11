"""Train DINO as a job on a SLURM cluster, with the flags of ``main_dino.py`` and those of the job.

    python run_with_submitit.py --nodes 2 --ngpus 8 --partition gpu --arch vit_small \\
        --data_path /path/to/imagenet/train --output_dir /path/to/runs/%j
"""

import sys
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dino import main_dino as training
from shared.launch import slurm

main = partial(slurm.submit_training, training, training.train_dino, __doc__)

if __name__ == "__main__":
    main()
