"""Write a trained trunk for other programs; a file is kept once it has given the torch network's output.

    python -m deepercluster.export --pretrained runs/materials --output_dir out

Writes the formats of :func:`shared.networks.export.export_network`, and ``<arch>_torchvision.pth``: the weights under
the names of torchvision's ``vgg16_bn`` (``features.*``, ``classifier.*``), for a network whose first convolution is
another one, see :func:`torchvision_vgg`. ``--fold`` makes the Sobel filter a part of it, so that it takes colours.
Needs the packages of ``pip install -e '.[export]'``.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import shared.run.passive_threads  # noqa: F401

import torch
from torch import Tensor, nn

from deepercluster.hub import ARCH, CARD, load_network
from deepercluster.vgg16 import VGG16, without_sobel
from shared import distributed
from shared.networks.export import add_export_flags, export_backbone, write_checked
from shared.networks.weights import safe_load
from shared.run.flags import Parser


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--pretrained", default=CARD.embedded_run, help="a run, a file or a release")
    add("--fold", action="store_true", help="make the Sobel filter a part of the first convolution")
    return add_export_flags(parser)


def torchvision_vgg(network: VGG16) -> nn.Module:
    """torchvision's VGG16 with batch norms, filled: images (B, C, H, W) to the same features.

    Its first convolution has a wider border and, if the Sobel filter is folded into it, a kernel of 5 x 5; where the
    filter is not, its input are the two gradients with a border of two pixels, what ``network.sobel`` gives.
    """
    from torchvision.models import VGG

    body = network.body
    first = body.features[0]
    border = 1 if network.sobel is not None else network.border + 1
    entrance = nn.Conv2d(first.in_channels, first.out_channels, first.kernel_size, padding=border)
    with torch.device("meta"):  # its own classifier takes seconds to start
        twin = VGG(nn.Identity(), init_weights=False)
    twin.features = nn.Sequential(entrance, *body.features[1:])
    twin.avgpool, twin.classifier = nn.Identity(), nn.Sequential(*body.classifier)
    twin.load_state_dict(body.state_dict())
    return twin.eval()


def export(args: argparse.Namespace) -> dict[str, Path]:
    """The files by format."""
    network = load_network(args.pretrained)
    if args.fold:
        network = without_sobel(network)
    side = args.image_size or [network.img_size]
    files = export_backbone(CARD, network, ARCH, args.output_dir, side, args.pretrained)
    path = Path(args.output_dir) / f"{ARCH}_torchvision.pth"
    write = partial(torch.save, torchvision_vgg(network).state_dict())

    def read(file: Path):
        twin = torchvision_vgg(VGG16(**CARD.sizes(ARCH, network.state_dict())))
        twin.load_state_dict(safe_load(file))
        return lambda images: twin.eval()(before(network, images))

    return files | {"torchvision": write_checked(path, write, read, network, [side[0]] * 2)}


def before(network: VGG16, images: Tensor) -> Tensor:
    """What :func:`torchvision_vgg` takes: the images, or their gradients."""
    if network.sobel is None:
        return images
    return network.sobel(nn.functional.pad(images, [network.border] * 4))


def main() -> None:
    distributed.run_script(export, get_args_parser().parse_args)


if __name__ == "__main__":
    main()
