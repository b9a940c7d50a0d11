"""Released DeepCluster weights."""

import os
from pathlib import Path

import torch

from shared import distributed
from shared.networks.weights import download

BASE_URL = "https://dl.fbaipublicfiles.com/deepcluster/"
RELEASES = ("alexnet", "vgg16")  # both behind the Sobel filter, with a top layer of 10,000 clusters


def fetch(arch: str) -> Path:
    """Download a released checkpoint, unless it is there already, into torch hub's folder of checkpoints.

    Args:
        arch: One of ``RELEASES``; the file is ``<arch>/checkpoint.pth.tar`` below the base address, which the
            environment variable ``DEEPCLUSTER_WEIGHTS_URL`` replaces.

    Raises:
        shared.networks.weights.DownloadError: If it cannot be had.
    """
    url = f"{os.environ.get('DEEPCLUSTER_WEIGHTS_URL', BASE_URL).rstrip('/')}/{arch}/checkpoint.pth.tar"
    path = Path(torch.hub.get_dir()) / "checkpoints" / f"deepcluster_{arch}.pth.tar"
    if not path.exists():
        distributed.print_once(f"downloading {url} to {path}")
        download(url, path)
    return path
