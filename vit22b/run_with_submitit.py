"""Train ViT-22B's networks as a job on a SLURM cluster, with the flags of ``main.py`` and those of the job.

    python run_with_submitit.py --nodes 16 --ngpus 8 --partition gpu --arch vit_e --mesh 16 8 \\
        --data_path /path/to/imagenet --output_dir /path/to/runs/%j
"""

import sys
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shared.launch import slurm
from vit22b import main as training

main = partial(slurm.submit_training, training, training.train_vit22b, __doc__)

if __name__ == "__main__":
    main()
