"""Train DeeperCluster as a job on a SLURM cluster, with the flags of ``main.py`` and those of the job.

    python run_with_submitit.py --nodes 8 --ngpus 8 --partition gpu --data_path /path/to/yfcc100m \\
        --image_ids flickr_unique_ids.npy --sobel 1 --super_classes 16 --k 320000 --dump_path /path/to/runs/%j
"""

import sys
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from deepercluster import main as training
from shared.launch import slurm

main = partial(slurm.submit_training, training, training.train_deepercluster, __doc__)

if __name__ == "__main__":
    main()
