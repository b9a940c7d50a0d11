"""Write a trained encoder for other programs; a file is kept once it has given the torch network's output.

    python -m msn.export --model_name deit_small --pretrained /path/to/run --fname msn-latest.pth.tar --output_dir out

Writes ``<model>.safetensors`` (names of the published checkpoints), ``<model>_timm.pth`` (a state dict for timm) and
``<model>.onnx`` (any batch size). Needs the packages of ``pip install -e '.[export]'``.
"""

import argparse
import copy
import functools
import sys
from pathlib import Path

import timm
from torch import nn

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from msn.flags import load_chosen_encoder, network_parser
from msn.pretrained import sizes_in
from msn.vision_transformer import VisionTransformer, build, interpolate_positions
from shared import distributed
from shared.networks.export import export_onnx, export_safetensors, export_state_dict
from shared.networks.weights import load_backbone_weights


def get_args_parser() -> argparse.ArgumentParser:
    parser = network_parser(__doc__)
    add = parser.add_argument_group("export").add_argument
    add("--output_dir", default=".", help="where the files go")
    add("--image_size", type=int, default=None, help="side in pixels of the images that the ONNX file takes; by "
        "default that of the position embeddings")  # fmt: skip
    return parser


def rebuild(options: dict, path: Path) -> nn.Module:
    """The network of ``build(**options)``, filled from a file."""
    network = build(**options)
    load_backbone_weights(network, path)
    return network.eval()


def timm_options(encoder: VisionTransformer, options: dict) -> dict | None:
    """Arguments of ``timm.create_model`` for the same network; None if timm has none of these names and shapes."""
    size = options["name"].removeprefix("deit_").split("_")[0]
    name = f"vit_{size}_patch16_224"
    if not timm.is_model(name):
        return None
    sizes = {key: options[key] for key in ("patch_size", "img_size", "in_chans")}
    found = {"model_name": name, "num_classes": 0, **sizes}
    twin = timm.create_model(**found).state_dict()
    shapes = {name: value.shape for name, value in encoder.state_dict().items()}
    return found if shapes == {name: value.shape for name, value in twin.items()} else None


def for_size(encoder: VisionTransformer, image_size: int) -> VisionTransformer:
    """A copy with position embeddings for images of this side, which need no interpolation in the ONNX file."""
    side = image_size // encoder.patch_embed.patch_size
    network = copy.deepcopy(encoder)
    network.pos_embed = nn.Parameter(interpolate_positions(encoder.pos_embed, side, side).detach())
    return network


def export(
    encoder: VisionTransformer, model_name: str, output_dir: str | Path, image_size: int | None = None
) -> dict[str, Path]:
    """Write an encoder in every format.

    Args:
        encoder: Without a head, in evaluation mode, on the CPU.
        model_name: Its name in ``ARCHITECTURES``.
        output_dir: Created if missing.
        image_size: Side in pixels of the ONNX input; by default that of the position embeddings.

    Returns:
        The files by format: ``safetensors``, ``timm`` (where timm has the network) and ``onnx``.

    Raises:
        shared.networks.export.ExportMismatch: If an exported network computes something else; its file is not kept.
    """
    output_dir = Path(output_dir)
    options = {"name": model_name, **sizes_in(encoder.state_dict(), model_name)}
    own_size = [options["img_size"]] * 2
    files = {"safetensors": output_dir / f"{model_name}.safetensors"}
    # the header says how to build the network
    export_safetensors(encoder, files["safetensors"], own_size, options, functools.partial(rebuild, options))
    arguments = timm_options(encoder, options)
    if arguments is None:
        print(f"no file for timm: it has no network with the names and shapes of {model_name}")
    else:
        path = files["timm"] = output_dir / f"{model_name}_timm.pth"
        export_state_dict(
            encoder, path, own_size, lambda file: timm.create_model(**arguments, checkpoint_path=str(file)).eval()
        )
        text = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        print(f"  timm.create_model({text}, checkpoint_path={str(path)!r})")
    files["onnx"] = output_dir / f"{model_name}.onnx"
    image_size = image_size or own_size[0]
    export_onnx(for_size(encoder, image_size), files["onnx"], encoder, [image_size] * 2)
    return files


def main() -> None:
    with distributed.clean_exit():
        args = get_args_parser().parse_args()
        encoder = load_chosen_encoder(args)
        export(encoder, args.model_name, args.output_dir, args.image_size)


if __name__ == "__main__":
    main()
