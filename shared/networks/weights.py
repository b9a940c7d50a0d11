"""Reading weights: without running code from the file, whatever layout they were saved in, and never by half."""

import argparse
import hashlib
import http.client
import math
import os
import re
import sys
import urllib.request
import warnings
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from shared import distributed

from .legacy_tar import is_legacy_tar, read_legacy_tar
from .names import RESNET_CHILDREN, TORCHVISION_VIT, TRANSFORMERS_VIT, join_qkv, renamed


class UnsafeFileError(ValueError):
    """A weight file asks for more than tensors and plain values, or is damaged; nothing in it has been run."""


class WeightMismatch(ValueError):
    """The weights of a file do not fill the network."""


class DownloadError(OSError):
    """A file could not be fetched, or is not the expected one."""


# --- Safe reading -----------------------------------------------------------------------------------------------------


class NumberType:
    """What ``numpy.dtype`` becomes when read: the code of one number type and its byte order, nothing else."""

    def __init__(self, code: str, align: bool = False, copy: bool = True):
        if not re.fullmatch(r"[fiu][1248]|b1", code):
            raise UnsafeFileError(f"numpy type {code!r} is not a number")
        self.code = code
        self.byte_order = "="

    def __setstate__(self, state: tuple):
        if state[1] not in ("<", ">", "|", "="):
            raise UnsafeFileError(f"byte order {state[1]!r}")
        self.byte_order = state[1]


def read_number(number_type: NumberType, data: bytes) -> float | int | bool:
    """What ``numpy.*.scalar`` becomes when read: a Python number."""
    return np.frombuffer(data, np.dtype(number_type.byte_order + number_type.code), count=1)[0].item()


# Checkpoints of published runs hold the parsed flags, and learning rates as numpy scalars. Numpy's own constructors are
# never called: a forged dtype can make them read foreign memory as objects.
SAFE_GLOBALS = [
    argparse.Namespace,
    (NumberType, "numpy.dtype"),
    (read_number, "numpy.core.multiarray.scalar"),
    (read_number, "numpy._core.multiarray.scalar"),
]


def safe_load(path: str | Path, map_location: str | torch.device = "cpu"):
    """Read a file of ``torch.save`` (all three formats) or safetensors, recognised by content, without running code.

    Besides tensors and plain containers, ``argparse.Namespace`` and numpy numbers are read, the latter as Python
    numbers.

    Raises:
        UnsafeFileError: If the file holds anything else, or is damaged.
        OSError: If it cannot be opened.
    """
    path = Path(path)
    with open(path, "rb") as file:
        start = file.read(9)
    try:
        if start[8:] == b"{":
            return safetensors.torch.load_file(path, device=str(map_location))
        if is_legacy_tar(path):
            return read_legacy_tar(path, map_location)
        if start.startswith(b"PK"):
            _refuse_expanding_archive(path)
        with torch.serialization.safe_globals(SAFE_GLOBALS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle protocol of files that are refused anyway
            contents = torch.load(path, map_location=map_location, weights_only=True)
        _refuse_expanding_contents(contents, path.stat().st_size)
        return contents
    except UnsafeFileError as error:
        raise UnsafeFileError(f"{path} is refused: {error}") from None
    except Exception as error:  # a forged pickle can raise anything from inside the reader
        asks_for = re.search(r"GLOBAL (\S+)", str(error))
        if asks_for:
            message = f"{path} is refused: it asks for {asks_for[1]}, which is neither a tensor nor a plain value"
        else:
            reason = str(error).split("\n")[-1] if isinstance(error, safetensors.SafetensorError) else _reason(error)
            message = f"{path} is damaged or no file of torch.save or safetensors: {reason}"
        raise UnsafeFileError(message) from None


def _reason(error: Exception) -> str:
    text = str(error).split("WeightsUnpickler error: ")[-1].strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}" if text else type(error).__name__


def _refuse_expanding_archive(path: Path) -> None:
    """``torch.save`` never compresses, so that records larger than their file are a decompression bomb."""
    with zipfile.ZipFile(path) as archive:
        size = sum(record.file_size for record in archive.infolist())
        is_program = any(record.filename.endswith("/constants.pkl") for record in archive.infolist())
    if is_program:
        raise UnsafeFileError("it is a TorchScript program; give the weights, torch.save(network.state_dict(), ...)")
    if size > path.stat().st_size:
        raise UnsafeFileError(f"its {path.stat().st_size} bytes expand to {size}")


def _refuse_expanding_contents(contents, file_size: int) -> None:
    """Refuse what would make the code that reads the result run out of memory or never end.

    A few bytes can describe a tensor of any size (strides of 0), and a list that contains itself.
    """
    waiting, seen = [(contents, 0)], set()
    while waiting:
        value, depth = waiting.pop()
        if isinstance(value, Tensor):
            if value.layout != torch.strided or value.is_quantized or value.is_nested or value.is_meta:
                raise UnsafeFileError("it holds a tensor that is sparse, quantized, nested or without data")
            if value.numel() * value.element_size() > file_size:
                raise UnsafeFileError(f"its {file_size} bytes expand to a tensor of shape {tuple(value.shape)}")
        elif isinstance(value, dict | list | tuple | set | argparse.Namespace) and id(value) not in seen:
            if depth == 100:
                raise UnsafeFileError("it is nested more than 100 levels deep")
            seen.add(id(value))
            parts = vars(value) if isinstance(value, argparse.Namespace) else value
            children = [*parts.keys(), *parts.values()] if isinstance(parts, dict) else parts
            waiting += [(child, depth + 1) for child in children]


# --- Layouts ----------------------------------------------------------------------------------------------------------

WRAPPERS = ("module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")  # modules around modules
AROUND = ("model", "net", "encoder")  # a network as the only part of another one, but for classifiers
CLASSIFIERS = ("head", "heads", "head_dist", "fc", "classifier", "AuxLogits", "aux1", "aux2")
PARTS_OF_DINOV2 = (
    (".mlp.w12.", "gates in its MLPs (SwiGLU)", "vit_giant_patch14_dinov2"),
    (".mlp.weights_in.", "gates in its MLPs (SwiGLU)", "vit_giant_patch14_dinov2"),
    (".mlp.gate_proj.", "gates in its MLPs (SwiGLU)", "vit_giant_patch14_dinov2"),
    (".ls1.gamma", "LayerScale", "vit_small_patch14_dinov2, vit_base_patch14_dinov2 and vit_large_patch14_dinov2"),
)
HEADS = ("projection_head", "prototypes", "pred", "top_layer")  # of trainings here, beside ``fc`` and ``head``
FOR_TRAINING = (*CLASSIFIERS, *HEADS, "pooler", "mask_token")  # no part of the representation
NETWORKS = ("teacher", "target_encoder", "encoder", "state_dict", "model")  # what trainings call the one to evaluate
ARCH_FLAGS = ("arch", "model_name", "model")  # what they call its architecture
RUN_FILES = ("checkpoint.pth", "checkpoint.pth.tar", "*-latest.pth.tar")  # what they leave in their folders


@dataclass
class BackboneWeights:
    """The backbone's part of a weight file, with the names of the bare backbone.

    Attributes:
        tensors: State dict without wrappers' prefixes.
        head: The entries of a projection head.
        origin: File and key, for messages.
        flags: Of the training that wrote the file; empty where it does not say.
    """

    tensors: dict[str, Tensor]
    head: dict[str, Tensor]
    origin: str
    flags: Mapping = field(default_factory=dict)


def read_backbone_weights(
    path: str | Path, checkpoint_key: str = "teacher", head_names: Sequence[str] = (), required: bool = False
) -> BackboneWeights:
    """Read a file and pick the backbone's weights; see :func:`select_backbone_weights`."""
    return select_backbone_weights(safe_load(path), checkpoint_key, str(path), head_names, required)


def select_backbone_weights(
    checkpoint,
    checkpoint_key: str = "teacher",
    origin: str = "the weights",
    head_names: Sequence[str] = (),
    required: bool = False,
) -> BackboneWeights:
    """The backbone's weights in a checkpoint of any layout.

    Known are training checkpoints (``{"student": ..., "teacher": ..., ...}``, the published ones and ours), plain state
    dicts, and state dicts under one of ``NETWORKS``, of several networks too (``teacher.backbone.``,
    ``student_backbone.``). What wrappers of the network or of its parts add to names (``module.``, ``_orig_mod.``), one
    of ``AROUND`` where all names begin with it, and the prefix ``backbone.`` are removed; where there is a
    ``backbone.``, all else belongs to the projection head, elsewhere the modules of ``head_names`` do. ViTs of
    transformers get the names of timm's.

    Args:
        checkpoint: What :func:`safe_load` returns.
        checkpoint_key: The network to take from a training checkpoint; without it, and of those of ``NETWORKS`` that
            are not ``required``, the first that is there: a target network before the one that follows it.
        origin: Where it comes from, for messages.
        head_names: Modules of the head in files that keep them beside those of the backbone.
        required: Refuse files without ``checkpoint_key``, also those of one network.

    Raises:
        WeightMismatch: If there is no such network.
    """
    if not isinstance(checkpoint, Mapping):
        raise WeightMismatch(f"{origin} holds {type(checkpoint).__name__}, not a dictionary of weights")
    networks = [key for key, value in checkpoint.items() if _is_state_dict(value)]
    absent = f"{origin} has no --checkpoint_key {checkpoint_key}; it holds {', '.join(networks) or 'one network'}"
    first = () if checkpoint_key in NETWORKS and not required else (checkpoint_key,)
    found = next((key for key in (*first, *NETWORKS) if key in networks), None)
    if found is not None:
        state_dict, origin = checkpoint[found], f"{found} of {origin}"
    elif _is_state_dict(checkpoint):
        state_dict = checkpoint
    elif networks:
        raise WeightMismatch(absent)
    else:
        keys = ", ".join(str(key) for key in list(checkpoint)[:10]) or "nothing"
        raise WeightMismatch(f"{origin} holds no network that is known here, but {keys}")

    tensors = {_unwrapped(name): value for name, value in state_dict.items()}
    of_key = (f"{checkpoint_key}.", f"{checkpoint_key}_backbone.")
    if required and checkpoint_key not in networks and not any(name.startswith(of_key) for name in tensors):
        raise WeightMismatch(absent)
    tensors = _one_network(tensors, checkpoint_key, head_names)
    prefixes = (f"{checkpoint_key}_backbone.", "backbone.", "teacher_backbone.", "student_backbone.")
    prefix = next((prefix for prefix in prefixes if any(name.startswith(prefix) for name in tensors)), "")
    inside = [name for name in tensors if name.startswith(prefix) and (prefix or name.split(".")[0] not in head_names)]
    backbone = {name.removeprefix(prefix): tensors.pop(name) for name in inside}
    backbone = _one_network(backbone, checkpoint_key, head_names)
    if any(name.endswith("embeddings.patch_embeddings.projection.weight") for name in backbone):
        backbone = join_qkv(renamed(backbone, TRANSFORMERS_VIT))
    return BackboneWeights(backbone, tensors, origin, flags_of_training(checkpoint))


def run_file(path: str | Path) -> Path:
    """The checkpoint in the folder of a run; anything but a folder stays as it is.

    Raises:
        ValueError: If the folder holds none or several.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    found = [file for pattern in RUN_FILES for file in sorted(path.glob(pattern))]
    if len(found) > 1:  # linear probes may write theirs beside it, which do not hold the flags
        found = [file for file in found if flags_of_training(safe_load(file)).keys() - {"classes"}] or found
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or f"no checkpoint ({', '.join(RUN_FILES)})"
        raise ValueError(f"{path} is a folder with {names}; name a file")
    return found[0]


def evaluated_network(checkpoint: Mapping) -> str | None:
    """The key of the network of a training checkpoint that is evaluated; None for other files."""
    return next((key for key in NETWORKS if key in checkpoint), None)


def flags_of_training(checkpoint) -> Mapping:
    """The flags that a checkpoint was written with, and the names of a classifier's ``classes``; empty where it does
    not say.
    """
    if not isinstance(checkpoint, Mapping):
        return {}
    flags = checkpoint.get("args")
    flags = vars(flags) if isinstance(flags, argparse.Namespace) else flags
    stated = {"arch": str, "classes": list}  # beside the flags; arch by torchvision's reference scripts
    beside = {name: checkpoint[name] for name, kind in stated.items() if isinstance(checkpoint.get(name), kind)}
    return {**beside, **(flags if isinstance(flags, Mapping) else {})}


def _one_network(tensors: dict[str, Tensor], key: str, head_names: Sequence[str]) -> dict[str, Tensor]:
    """Of a state dict of several networks that of ``key``; without a name of ``AROUND`` before all others."""
    while True:
        firsts = {"".join(name.partition(".")[:2]) for name in tensors}  # "blocks." or "cls_token"
        several = [f"{part}." for part in (key, "teacher", "student") if f"{part}." in firsts and part not in AROUND]
        in_first = sum(name.startswith("0.") for name in tensors)
        if 2 * in_first > len(tensors) and all(first[:-1].isdigit() for first in firsts):
            several = ["0."]  # of an nn.Sequential the part that is more than half of it
        around = firsts - {f"{name}." for name in (*CLASSIFIERS, *head_names)}
        if several:
            prefix = several[0]
            tensors = {name: value for name, value in tensors.items() if name.startswith(prefix)}
        elif around in [{f"{part}."} for part in AROUND]:
            (prefix,) = around
        else:
            return tensors
        tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}


def _is_state_dict(value) -> bool:
    return isinstance(value, Mapping) and len(value) > 0 and all(isinstance(v, Tensor) for v in value.values())


def _unwrapped(name: str) -> str:
    return re.sub(rf"(^|\.)(?:(?:{'|'.join(WRAPPERS)})\.)+", r"\1", name)


@dataclass(frozen=True)
class VitShape:
    """What the tensors of a vision transformer say about it; ``img_size`` and ``patch_size`` in pixels."""

    embed_dim: int
    depth: int
    patch_size: int
    img_size: int
    in_chans: int

    @property
    def size(self) -> str:
        sizes = {96: "micro", 192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge"}
        return sizes.get(self.embed_dim, "")

    def names(self) -> list[str]:
        """What a network of this shape is called in one place or another."""
        size, patch = self.size, self.patch_size
        return [f"vit_{size}", f"deit_{size}", f"deit_{size}_p{patch}", f"vit_{size}_patch{patch}_224"] if size else []

    def __str__(self) -> str:
        name = f"vit_{self.size}" if self.size else f"ViT of dimension {self.embed_dim}"
        return (
            f"{name}/{self.patch_size} of {self.depth} blocks for {self.img_size}-pixel images "
            f"of {self.in_chans} channels"
        )


def vit_shape(tensors: Mapping[str, Tensor]) -> VitShape | None:
    """Read the shape of a ViT with a class token off its state dict; None if it is another network."""
    patches, positions = tensors.get("patch_embed.proj.weight"), tensors.get("pos_embed")
    if patches is None or positions is None or "cls_token" not in tensors or positions.dim() != 3:
        return None
    blocks = [int(name.split(".")[1]) for name in tensors if re.match(r"blocks\.\d+\.", name)]
    embed_dim, in_chans, patch_size, _ = patches.shape
    registers = [tensors[name].shape[1] for name in ("reg_token", "register_tokens") if name in tensors]
    for others in (1, 0, 1 + sum(registers)):  # positions of the class token, of patches only, of registers too
        side = math.isqrt(max(positions.shape[1] - others, 0))
        if side and side**2 == positions.shape[1] - others:
            return VitShape(embed_dim, max(blocks, default=-1) + 1, patch_size, side * patch_size, in_chans)
    return None


# --- Loading ----------------------------------------------------------------------------------------------------------


@dataclass
class LoadReport:
    """Which entries of a network were filled: ``matched`` of ``total``, and the names of all others."""

    matched: int
    total: int
    head_entries: int
    missing: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)

    def is_complete(self) -> bool:
        return self.matched == self.total and not self.unexpected

    def details(self) -> str:
        lines = []
        for title, entries in (
            ("missing in the file", self.missing),
            ("of another shape", self.mismatched),
            ("unknown to the network", self.unexpected),
        ):
            if entries:
                more = f" and {len(entries) - 5} more" if len(entries) > 5 else ""
                lines.append(f"  {len(entries)} {title}: {', '.join(entries[:5])}{more}")
        return "\n".join(lines)


def load_backbone_weights(
    backbone: nn.Module,
    weights: str | Path | BackboneWeights,
    allow_partial: bool = False,
) -> LoadReport:
    """Fill a backbone from a file of any layout and print how many entries matched.

    Entries of a projection head or classifier that the backbone does not have are left out and counted apart. Besides
    the backbone's own names, those of torchvision's ViTs and, for timm's networks, of the papers' original files are
    understood.

    Args:
        backbone: Network without a head.
        weights: A file, or what :func:`read_backbone_weights` returned.
        allow_partial: Load what matches when it is not everything.

    Raises:
        WeightMismatch: If not every entry of the backbone and of the file finds its counterpart, and unless
            ``allow_partial``; or if none does, or a weight is not finite.
    """
    if not isinstance(weights, BackboneWeights):
        weights = read_backbone_weights(weights)
    target = backbone.state_dict()
    tensors = _renamed_for(backbone, target, weights.tensors)

    bad = next((name for name, value in tensors.items() if not value.isfinite().all()), None)
    if bad is not None:
        raise WeightMismatch(f"{weights.origin}: {bad} holds values that are not finite")
    classifier = [name for name in tensors if name not in target and name.split(".")[0] in FOR_TRAINING]
    matching = {k: v for k, v in tensors.items() if k in target and v.shape == target[k].shape}
    # counters of BatchNorm are absent in old files and unused with a fixed momentum
    expected = [k for k in target if k in tensors or not k.endswith("num_batches_tracked")]
    report = LoadReport(
        matched=len(matching),
        total=len(expected),
        head_entries=len(weights.head) + len(classifier),
        missing=[k for k in expected if k not in tensors],
        mismatched=[
            f"{k} {tuple(v.shape)} instead of {tuple(target[k].shape)}"
            for k, v in tensors.items()
            if k in target and k not in matching
        ],
        unexpected=[k for k in tensors if k not in target and k not in classifier],
    )
    summary = f"{weights.origin}: {report.matched}/{report.total} entries of the network matched"
    if not report.is_complete():
        summary += f"\n{report.details()}{_hint(tensors, target)}"
        if not allow_partial or not matching:
            raise WeightMismatch(summary)
    backbone.load_state_dict(matching, strict=False)
    left_out = f", {report.head_entries} of a head left out" if report.head_entries else ""
    distributed.print_once(summary + left_out)
    return report


def _renamed_for(backbone: nn.Module, target: Mapping[str, Tensor], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    if "class_token" in tensors and "cls_token" in target:
        return renamed(tensors, TORCHVISION_VIT)
    if "4.0.conv1.weight" in tensors and "layer1.0.conv1.weight" in target:
        return renamed(tensors, RESNET_CHILDREN)
    needed = {name for name in target if not name.endswith("num_batches_tracked")}
    if not needed & tensors.keys():  # one of the two is part of another network, which calls it ``prefix``
        for prefix in {name.partition(".")[0] + "." for name in needed}:
            if needed <= {prefix + name for name in tensors}:
                return {prefix + name: value for name, value in tensors.items()}
        for prefix in {name.partition(".")[0] + "." for name in tensors}:
            if needed <= {name.removeprefix(prefix) for name in tensors}:
                return {name.removeprefix(prefix): value for name, value in tensors.items()}
    # timm's networks know the names in the papers' original files
    convert = getattr(sys.modules[type(backbone).__module__], "checkpoint_filter_fn", None)
    if convert is not None and not target.keys() <= tensors.keys():
        return convert(dict(tensors), backbone)
    return tensors


def _hint(tensors: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> str:
    found, wanted = vit_shape(tensors), vit_shape(target)
    if found is not None and wanted is not None and found != wanted:
        return f"\n  the file looks like a {found}, the network is a {wanted}"
    if "sobel.0.weight" in tensors and "sobel.0.weight" not in target:
        return "\n  the network of the file looks at Sobel gradients, not at colours: this one cannot"
    for part, what, example in PARTS_OF_DINOV2:
        if any(part in name for name in tensors) and not any(part in name for name in target):
            return f"\n  the file is a ViT with {what}, as DINOv2's are: timm has {example}"
    first, *others = {name.split(".")[0] for name in tensors}
    alone = not others and not any(name.split(".")[0] == first for name in target)
    return f"\n  all names in the file begin with {first}." if alone else ""


def weights_checksum(network: nn.Module) -> int:
    """CRC-32 of all weights: what was learned on features makes sense with their own network only."""
    checksum = 0
    for value in network.state_dict().values():
        checksum = zlib.crc32(np.ascontiguousarray(value.cpu().numpy()), checksum)
    return checksum


# --- Downloading ------------------------------------------------------------------------------------------------------


def download(
    url: str, path: str | Path, sha256: str | None = None, length: int | None = None, timeout_s: float = 60
) -> Path:
    """Fetch a file; ``path`` appears only once it is complete and verified.

    Args:
        url: http, https or file address.
        path: Where to put it; the folder is created.
        sha256: Expected hash, hexadecimal, where known.
        length: Expected number of bytes, where known; otherwise the length the server states.
        timeout_s: Longest silence of the server.

    Raises:
        DownloadError: If the address cannot be read or the file is not the expected one.
    """
    path = Path(path)
    if not is_address(url):
        raise DownloadError(f"{url} is no http, https or file address")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part-{os.getpid()}")
    digest, received = hashlib.sha256(), 0
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as response, open(temporary, "wb") as file:
            stated = response.headers.get("Content-Length")
            expected = length if length is not None else int(stated) if stated else None
            while chunk := response.read(1 << 20):
                received += len(chunk)
                if expected is not None and received > expected:
                    raise DownloadError(f"{url} is longer than the expected {expected} bytes")
                digest.update(chunk)
                file.write(chunk)
        if expected is not None and received != expected:
            raise DownloadError(f"{url} ended after {received} of {expected} bytes")
        if sha256 is not None and digest.hexdigest() != sha256.lower():
            raise DownloadError(f"{url} has SHA-256 {digest.hexdigest()}, expected {sha256}")
        os.replace(temporary, path)
    except DownloadError:
        raise
    except (OSError, http.client.HTTPException) as error:
        raise DownloadError(f"cannot download {url}: {getattr(error, 'reason', None) or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def is_address(path: str) -> bool:
    return path.startswith(("http://", "https://", "file://"))


def fetch_file(path: str, flag: str) -> Path:
    """A local file, or a downloaded one kept in torch hub's folder of checkpoints.

    Args:
        path: File name or address.
        flag: Where it was given, for messages.
    """
    if is_address(path):
        # many a file is called checkpoint.pth: the name alone would give the weights of another address
        folder = f"{zlib.crc32(path.encode()):08x}"
        file = Path(torch.hub.get_dir()) / "checkpoints" / folder / path.rsplit("/", 1)[-1]
        return file if file.exists() else download(path, file)
    if not Path(path).is_file():
        raise ValueError(f"{flag} {path} is not a file")
    return Path(path)
