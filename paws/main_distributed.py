"""Run a program of this folder as a job on a SLURM cluster, with the flags of the program and those of the job.

    python main_distributed.py --fname configs/paws/imgnt_train.yaml --nodes 8 --tasks-per-node 8 --partition gpu \\
        --time 4300 --folder /path/to/job_logs --data_path /path/to/imagenet/train --subset_path imagenet_subsets \\
        --output_dir /path/to/runs/%j
    python main_distributed.py --sel suncet_train --fname configs/suncet/imgnt_train.yaml --nodes 8 ...

As in the official script --folder is where submitit writes its logs; the output of the training is --output_dir, or
``logging.folder`` of the YAML file.
"""

import argparse
import sys
from pathlib import Path

import yaml

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paws import main as programs
from shared import distributed
from shared.launch import slurm
from shared.run.flags import Parser


def get_args_parser(program: str = "paws_train") -> argparse.ArgumentParser:
    parser = programs.get_args_parser(program)
    slurm.launcher_parser(parser, __doc__, program, nodes=1, ngpus=1, timeout=4300)
    batch = "--fname is a YAML list of configuration files, of which each becomes a job"
    parser.add_argument("--batch-launch", action="store_true", help=batch)
    return parser


def main(arguments: list[str] | None = None) -> None:
    words = slurm.with_our_names(arguments)
    program = programs.selected(words)
    with distributed.clean_exit():
        for command in configurations(words):
            args = programs.parse_args(command, get_args_parser(program))
            if args.batch_launch:
                raise ValueError("--batch-launch cannot be abbreviated")
            del args.batch_launch
            slurm.submit(programs.program_function(program), args)


def configurations(words: list[str]) -> list[list[str]]:
    """The command line of each job: with ``--batch-launch`` one for every file in the list that ``--fname`` names."""
    if "--batch-launch" not in words:
        return [words]
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--fname", required=True)
    known, rest = first.parse_known_args([word for word in words if word != "--batch-launch"])
    try:
        files = yaml.safe_load(Path(known.fname).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        files = error
    if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
        raise ValueError(f"--batch-launch: --fname {known.fname} is no YAML list of configuration files: {files}")
    return [[*rest, "--fname", file] for file in files]


if __name__ == "__main__":
    main()
