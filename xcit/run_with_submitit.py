"""Train XCiT as a job on a SLURM cluster, with the flags of ``main.py`` and those of the job.

    python run_with_submitit.py --nodes 1 --ngpus 8 --partition gpu --model xcit_small_12_p16 --batch-size 128 \\
        --drop-path 0.05 --data-path /path/to/imagenet --output_dir /path/to/runs/%j
"""

import sys
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shared.launch import slurm
from xcit import main as training

main = partial(slurm.submit_training, training, training.train_xcit, __doc__)

if __name__ == "__main__":
    main()
