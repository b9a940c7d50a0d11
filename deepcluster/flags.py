"""Flags that the evaluation scripts have in common."""

import argparse

MODEL_HELP = "checkpoint of main.py or of the official code; alexnet or vgg16: the released weights"
IMAGES_HELP = "a folder, a .txt list or a torchvision data set name; None: the embedded digits"


def evaluation_parser(docstring: str) -> argparse.ArgumentParser:
    """A parser whose description is the first paragraph of the script's docstring."""
    return argparse.ArgumentParser(
        description=docstring.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )


def add_process_flags(parser: argparse.ArgumentParser, launcher: bool = True) -> None:
    """Device and loader flags, and those of the launcher for scripts that run on several processes."""
    add = parser.add_argument_group("processes").add_argument
    add("--workers", "--num_workers", dest="num_workers", type=int, default=4, help="loader processes per rank")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    if launcher:
        add("--dist_url", default="env://", help="rendezvous of the processes")
        add("--local_rank", "--local-rank", type=int, default=0, help="ignored: read from the environment")
