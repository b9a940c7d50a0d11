"""Convert the published files of SEER to the names of torchvision or timm, or into slices, a tensor at a time.

    python convert_checkpoint.py --arch regnet10B -i model_iteration124500_conso.torch -o regnet10B.safetensors
    python convert_checkpoint.py --arch regnet10B -i model_iteration124500_conso.torch -o sliced.torch -t sliced

Three layouts are read: *consolidated*, one file; *sliced*, a file that names one for every tensor; *sharded*, a file
that names one for every process of the training, each with its piece of every flattened tensor. The network on the meta
device says which tensors there must be, and none other. No more than one of them is in memory: a consolidated file and
shards are mapped, the result is written as it comes.

The weights of SEER are under a licence that forbids commercial use and redistribution, converted ones as well.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # run as a script: make the repository root importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import shared.run.passive_threads  # noqa: F401

import numpy as np
import safetensors
import torch
from torch import Tensor

from seer.regnet import SIZES, RegNet
from shared import distributed
from shared.networks.names import new_name
from shared.networks.weights import WeightMismatch, safe_load
from shared.run.command_line import Parser, plain_exit
from shared.run.files import atomic_file

LICENCE = "SEER License: non-commercial research only, no redistribution"
WRAPPERS = re.compile(r"(?:_fsdp_wrapped_module|_fpw_module|_checkpoint_wrapped_module|module)\.")
OFFICIAL = (  # published names of both of their trunks and of their RegNet package, to torchvision's
    (r"^trunk\.|^_feature_blocks\.", ""),
    (r"^(?:conv1|stem)\.stem\.", "stem."),
    (r"^(?:res\d+|trunk_output\.block\d+)\.(?:block\d+-part\d+\.)?(block(\d+)-\d+)\.", r"trunk_output.block\2.\1."),
    (r"\.f\.se\.excitation\.0\.", ".f.se.fc1."),
    (r"\.f\.se\.excitation\.2\.", ".f.se.fc2."),
    (r"\.f\.c\.weight$", ".f.c.0.weight"),
    (r"\.f\.final_bn\.", ".f.c.1."),
    (r"(-\d+)\.proj\.weight$", r"\1.proj.0.weight"),
    (r"(-\d+)\.bn\.", r"\1.proj.1."),
    (r"^0\.clf\.0\.", "fc."),
    (r"^0\.(projection_head|prototypes\d+)\.", r"head.\1."),
)
TO_OFFICIAL = (  # the way back, to the names of the plain trunk
    (r"^stem\.", "conv1.stem."),
    (r"^trunk_output\.block(\d+)\.", lambda m: f"res{int(m[1]) + 1}."),
    (r"\.f\.se\.fc1\.", ".f.se.excitation.0."),
    (r"\.f\.se\.fc2\.", ".f.se.excitation.2."),
    (r"\.f\.c\.0\.", ".f.c."),
    (r"\.f\.c\.1\.", ".f.final_bn."),
    (r"\.proj\.0\.", ".proj."),
    (r"\.proj\.1\.", ".bn."),
    (r"^", "_feature_blocks."),
    (r"^_feature_blocks\.fc\.", "0.clf.0."),
)
TIMM = (  # torchvision's names to timm's
    (r"^stem\.0\.", "stem.conv."),
    (r"^stem\.1\.", "stem.bn."),
    (r"^trunk_output\.block(\d+)\.block\d+-(\d+)\.", lambda m: f"s{m[1]}.b{int(m[2]) + 1}."),
    (r"\.proj\.0\.", ".downsample.conv."),
    (r"\.proj\.1\.", ".downsample.bn."),
    (r"\.f\.([abc])\.([01])\.", lambda m: f".conv{'abc'.index(m[1]) + 1}.{('conv', 'bn')[int(m[2])]}."),
    (r"\.f\.se\.", ".se."),
    (r"^fc\.", "head.fc."),
)


def from_official(name: str) -> str:
    """torchvision's name of a tensor of a trunk, ``head.*`` of SwAV's head, ``fc.*`` of a classifier."""
    return new_name(WRAPPERS.sub("", name), OFFICIAL)


def to_official(name: str) -> tuple[str, str]:
    """Part (trunk or heads) and published name of one of our tensors."""
    return "heads" if name.startswith("fc.") else "trunk", new_name(name, TO_OFFICIAL)


def to_timm(name: str) -> str:
    return new_name(name, TIMM)


# --- Reading ----------------------------------------------------------------------------------------------------------


def read_file(path: Path, flag: str) -> object:
    """A file of ``torch.save``, its tensors mapped where its format allows it, and no code run."""
    if not path.is_file():
        raise ValueError(f"{flag} {path} is not a file")
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception:  # an old format, or an error, which the safe reader tells
        return safe_load(path)


def parts_of(contents: object, path: Path) -> dict[str, Tensor | str]:
    """Trunk and heads by our names: tensors, or names of files of slices."""
    try:
        model = contents["classy_state_dict"]["base_model"]["model"]
        return {from_official(name): value for part in ("trunk", "heads") for name, value in model[part].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise WeightMismatch(
            f"{path} is none of the published layouts: no classy_state_dict with base_model, model, trunk and heads; "
            "runs of main_seer.py are read everywhere as they are"
        ) from error


def open_official(path: Path, flag: str = "--input") -> dict[str, Callable[..., Tensor]]:
    """Functions that read each tensor of a file of any layout, by our names; those of a sharded one need its shape.

    A slice or a shard that is missing or torn is named.
    """
    contents, parts = read_file(path, flag), []
    for name in (contents.get("shards") or [None]) if is_sharded(contents) else ():
        shard = path.parent / str(name)
        if name is None or not shard.is_file():
            raise ValueError(f"{flag} {path}: its shard {name} is missing")
        parts.append(parts_of(read_file(shard, flag), shard))
        if parts[-1].keys() != parts[0].keys():
            raise ValueError(f"{flag} {path}: the shard {name} holds other tensors than the first one")
    whole = parts[0] if parts else parts_of(contents, path)
    distributed.print_once(f"{path}: {LICENCE}")

    def read(name: str, shape: torch.Size | None = None) -> Tensor:
        if parts:
            return joined([part[name] for part in parts], shape)
        if isinstance(whole[name], Tensor):
            return whole[name]
        if not (file := path.parent / str(whole[name])).is_file():
            raise ValueError(f"{flag} {path}: the slice {file} of {name} is missing")
        tensor = safe_load(file)
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{flag} {path}: the slice {file} holds {type(tensor).__name__}, not a tensor")
        return tensor

    return {name: partial(read, name) for name in whole}


def joined(pieces: list[Tensor], shape: torch.Size) -> Tensor:
    """A tensor from its pieces: flat ones, of which the last may be padded, or a copy on every process."""
    first = pieces[0]
    if first.shape == shape and (first.dim() != 1 or shape.numel() == 1 or all(torch.equal(first, p) for p in pieces)):
        return first
    flat = torch.cat([piece.flatten() for piece in pieces])
    return flat[: shape.numel()].view(shape) if len(flat) >= shape.numel() else flat


def official_tensors(path: Path, target: Mapping[str, Tensor], flag: str = "--input") -> Iterator[tuple[str, Tensor]]:
    """(our name, tensor) of a published file, one at a time, in the order of ``target``, a state dict.

    Tensors of a head are left out where ``target`` has none.

    Raises:
        WeightMismatch: If the file does not hold exactly these tensors.
    """
    readers = open_official(path, flag)
    known = {name for name in readers if name in target or not name.startswith(("head.", "fc."))}
    for what, names in (("lacks", target.keys() - known), ("has beside the network's", known - target.keys())):
        if names:
            raise WeightMismatch(f"{flag} {path} {what} {len(names)} tensors, the first is {min(names)}")
    for name, like in target.items():
        tensor = readers[name](like.shape)
        if tensor.shape != like.shape:
            raise WeightMismatch(f"{flag} {path}: {name} is {tuple(tensor.shape)} instead of {tuple(like.shape)}")
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise WeightMismatch(f"{flag} {path}: {name} holds values that are not finite")
        yield name, tensor.to(like.dtype)


def is_sharded(contents: object) -> bool:
    return isinstance(contents, Mapping) and contents.get("type") == "sharded"


def read_for_card(contents: object, path: Path) -> object:
    """What a card reads of a file: of the published layouts the network under our names, of others what is there."""
    is_official = is_sharded(contents) or (isinstance(contents, Mapping) and "classy_state_dict" in contents)
    if path.suffix == ".safetensors" and (safetensors.safe_open(path, "pt").metadata() or {}).get("licence"):
        distributed.print_once(f"{path}: {LICENCE}")
    if not is_official:
        return contents
    if is_sharded(contents):
        raise ValueError(f"--pretrained {path} is sharded: convert it with convert_checkpoint.py first")
    return {name: read() for name, read in open_official(path, "--pretrained").items()}


# --- Writing ----------------------------------------------------------------------------------------------------------


def write_safetensors(path: Path, target: Mapping[str, Tensor], tensors: Iterator[tuple[str, Tensor]], rename) -> None:
    """Write tensors as they come, in the order of ``target``, which says their shapes and types."""
    types = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}
    header, end = {"__metadata__": {"format": "pt", "licence": LICENCE}}, 0
    for name, like in target.items():
        start, end = end, end + like.numel() * like.element_size()
        header[rename(name)] = {"dtype": types[like.dtype], "shape": list(like.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in tensors:
            np.asarray(tensor.contiguous().view(-1).view(torch.uint8)).tofile(file)


def write_slices(path: Path, tensors: Iterator[tuple[str, Tensor]]) -> None:
    """A file for every tensor in ``<name>_layers``, and one that names them, with the published names of a trunk."""
    folder = path.with_name(f"{path.stem}_layers")
    folder.mkdir(parents=True, exist_ok=True)
    names: dict[str, dict[str, str]] = {"trunk": {}, "heads": {}}
    for name, tensor in tensors:
        part, official = to_official(name)
        torch.save(tensor.clone(), folder / f"{official}.torch")  # a clone: a mapped file is not written whole
        names[part][official] = f"{folder.name}/{official}.torch"
    state = {"classy_state_dict": {"base_model": {"model": names}}, "type": "sliced"}
    with atomic_file(path) as temporary:
        torch.save(state, temporary)


# --- Command line -----------------------------------------------------------------------------------------------------


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--arch", required=True, choices=tuple(SIZES), help="the network, which says what must be in the file")
    add("-i", "--input", required=True, type=Path, help="a published file of any layout")
    add("-o", "--output", required=True, type=Path, help="the converted file; slices lie in a folder beside it")
    kinds = "names of the result, a .safetensors, or the published names in slices"
    add("-t", "--output_type", default="torchvision", choices=("torchvision", "timm", "sliced"), help=kinds)
    add("--num_classes", type=int, default=0, help="of the classifier of a fine-tuned network")
    return parser


def convert(args: argparse.Namespace) -> None:
    if args.output.resolve() == args.input.resolve():
        raise ValueError(f"--output {args.output} is the file of --input: name another one")
    with torch.device("meta"):
        target = RegNet(SIZES[args.arch], num_classes=args.num_classes).state_dict()
    tensors = official_tensors(args.input, target)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    if args.output_type == "sliced":
        write_slices(args.output, tensors)
    else:
        write_safetensors(args.output, target, tensors, to_timm if args.output_type == "timm" else str)
    print(f"{args.output}: {len(target)} tensors of {args.arch}", flush=True)


def main() -> None:
    with plain_exit():
        convert(get_args_parser().parse_args())


if __name__ == "__main__":
    main()
