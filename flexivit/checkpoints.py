"""Files that fill a FlexiViT: published ones, those of ``main.py``, and other ViTs'."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors
import torch
from torch import Tensor

from shared import distributed
from shared.networks import pretrained as networks
from shared.networks.card import Card
from shared.networks.classifiers import load_completely
from shared.networks.names import new_name
from shared.networks.vit_parts import heads_of
from shared.networks.weights import WeightMismatch, flags_of_training, safe_load, select_backbone_weights

from .flexible_vit import SIZES, FlexiViT, pi_resize, zoom_positions
from .hub import CARD, sizes

NPZ_NAMES = {
    r"^params/": "",
    r"^embedding/": "patch_embed.proj.",
    r"^pos_embedding$": "pos_embed",
    r"^cls$": "cls_token",
    r"^Transformer/encoderblock_(\d+)/": r"blocks.\1.",
    r"^Transformer/encoder_norm/": "norm.",
    r"^MAPHead_0/": "attn_pool.",
    r"LayerNorm_0/": "norm1.",
    r"LayerNorm_1/": "norm2.",
    r"MultiHeadDotProductAttention_0/": "attn.",
    r"MlpBlock_0/Dense_0/": "mlp.fc1.",
    r"MlpBlock_0/Dense_1/": "mlp.fc2.",
    r"attn_pool\.norm1\.": "attn_pool.norm.",
    r"attn_pool\.probe": "attn_pool.latent",
    r"attn_pool\.attn\.": "attn_pool.",
    r"^head/": "head.",
    r"(kernel|scale)$": "weight",
    r"/": ".",
}
SAID = ("num_heads", "gelu", "mean", "std", "low")  # in files of resize_patch.py and of exports
SCALED = {"1": "attn.proj", "2": "mlp.fc2"}  # by LayerScale
NORMALISATIONS = {
    "imagenet": {"mean": Card.mean, "std": Card.std},
    "half": {"mean": CARD.mean, "std": CARD.std},  # in [-1, 1]
}


def from_npz(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """The published files' arrays under this network's names; queries, keys and values become one matrix."""
    tensors = {}
    for name, array in arrays.items():
        if name.startswith("opt/"):
            continue
        tensor = torch.from_numpy(np.array(array, dtype=np.float32))
        name = new_name(name, NPZ_NAMES.items())
        if "query" in name or "key" in name or "value" in name:  # (D, heads, d) or (heads, d)
            tensor = tensor.flatten(1).T if name.endswith("weight") else tensor.flatten()
        elif name.endswith("out.weight"):  # (heads, d, D)
            tensor = tensor.flatten(0, 1).T
        elif name.endswith("weight") and tensor.dim() == 2:
            tensor = tensor.T
        elif tensor.dim() == 4:  # (height, width, C, D)
            tensor = tensor.permute(3, 2, 0, 1)
        tensors[name.replace(".out.", ".proj.")] = tensor.contiguous()
    for name in [name for name in tensors if ".query." in name]:
        parts = {part: tensors.pop(name.replace("query", part)) for part in ("query", "key", "value")}
        if name.startswith("attn_pool"):
            tensors[name.replace("query", "q")] = parts.pop("query")
            tensors[name.replace("query", "kv")] = torch.cat(list(parts.values()))
        else:
            tensors[name.replace("query", "qkv")] = torch.cat(list(parts.values()))
    return tensors


def header_of(path: Path) -> dict:
    """What the header of a safetensors file says of its network; {} for other files."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            header = file.metadata() or {}
    except safetensors.SafetensorError:
        return {}
    return {name: value if name == "gelu" else json.loads(value) for name, value in header.items() if name in SAID}


def read_weights(pretrained: str | Path, flag: str = CARD.weights_flag) -> tuple[dict[str, Tensor], dict]:
    """Tensors of a release or a file, and what it says of its network beside them: of ``SAID``, and ``grid``.

    Understood are the published ``.npz`` files, checkpoints of ``main.py``, what ``resize_patch.py`` and ``export.py``
    write, and ViTs under timm's names, such as DeiT's, DINO's and MSN's.
    """
    path = networks.locate(CARD, pretrained, flag)
    ours = {"gelu": "tanh", "mean": CARD.mean, "std": CARD.std}
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            return from_npz(arrays), ours
    checkpoint = safe_load(path)
    flags = header_of(path) or flags_of_training(checkpoint)
    said = {name: flags[name] for name in SAID if name in flags}
    if "posemb_grid" in flags:  # a run of main.py
        said |= ours | {"grid": (flags["posemb_grid"],) * 2}
    if flags.get("channels") or "low" in said:  # images that are no RGB are normalised where they are read
        said |= {"mean": CARD.mean, "std": CARD.std}
    return select_backbone_weights(checkpoint, CARD.checkpoint_key, str(pretrained)).tensors, said


def as_plain_vit(tensors: dict[str, Tensor], origin: str) -> dict[str, Tensor]:
    """The same network with LayerScale in the layers that it scales, and its class token's position in the token.

    Raises:
        WeightMismatch: If it has parts that FlexiViT has not.
    """
    if "fc_norm.weight" in tensors:
        raise WeightMismatch(f"{origin} normalises the mean of its tokens (fc_norm), a FlexiViT the tokens")
    if unknown := [name for name in tensors if re.search(r"register|reg_token|q_norm", name)]:
        raise WeightMismatch(f"{origin}: {unknown[0]} belongs to a ViT of another kind")
    tensors = {name: value for name, value in tensors.items() if not name.startswith("head_dist.")}
    for name in list(tensors):
        if scale := re.fullmatch(r"(blocks\.\d+\.)(?:ls(\d)\.gamma|gamma_(\d))", name):  # timm's and DeiT-III's names
            layer, gamma = scale[1] + SCALED[scale[2] or scale[3]], tensors.pop(name)
            tensors[f"{layer}.weight"] = gamma[:, None] * tensors[f"{layer}.weight"]
            tensors[f"{layer}.bias"] = gamma * tensors[f"{layer}.bias"]
    positions, token = tensors.get("pos_embed"), tensors.get("cls_token")
    if positions is None or token is None or math.isqrt(positions.shape[1]) ** 2 == positions.shape[1]:
        return tensors
    return tensors | {"cls_token": token + positions[:, :1], "pos_embed": positions[:, 1:]}


def network_of(tensors: dict[str, Tensor], said: Mapping, origin: str) -> FlexiViT:
    """What :func:`read_weights` gives as a network, with the classifier if there is one, in evaluation mode."""
    tensors = as_plain_vit(tensors, origin)
    found = {name: said[name] for name in ("gelu", "grid") if name in said} | sizes(origin, tensors)
    width = tensors["norm.weight"].numel()
    depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    known = {(width, depth): num_heads for width, depth, num_heads in SIZES.values()}
    num_heads = said.get("num_heads") or known.get((width, depth)) or heads_of(width, depth, origin)
    classes, in_chans = len(tensors.get("head.bias", ())), tensors["patch_embed.proj.weight"].shape[1]
    options = {"gelu": "none", "hidden_dim": len(tensors["blocks.0.mlp.fc1.bias"]), "in_chans": in_chans, **found}
    network = FlexiViT(width, depth, num_heads, num_classes=classes, **options)
    load_completely(network, tensors, origin)
    return network.eval()


def described(network: FlexiViT) -> dict:
    """What no tensor of a network shows."""
    block = network.blocks[0]
    return {"num_heads": block.attn.num_heads, "gelu": block.mlp.act.approximate}


def load_as_trained(pretrained: str | Path, flag: str = CARD.weights_flag) -> tuple[FlexiViT, dict]:
    """The network of a file in evaluation mode, and ``mean`` and ``std`` of its images: ImageNet's if it names none."""
    tensors, said = read_weights(pretrained, flag)
    network = network_of(tensors, said, f"{flag} {pretrained}")
    guess = "imagenet" if network.patch_embed.proj.in_channels in (1, 3) else "half"
    return network, {name: tuple(said.get(name, value)) for name, value in NORMALISATIONS[guess].items()}


@torch.no_grad()
def load_flexible(pretrained: str | Path, flag: str = CARD.weights_flag, normalisation: str | None = None) -> FlexiViT:
    """The network of a file for images in [-1, 1]: another mean and std become part of its patch embedding, exactly.

    Args:
        normalisation: Of the images that it was trained with, of ``NORMALISATIONS``; None: what the file says, else
            ImageNet's.
    """
    network, images = load_as_trained(pretrained, flag)
    images, ours = NORMALISATIONS.get(normalisation, images), NORMALISATIONS["half"]
    if images == ours:
        return network
    kernel, bias = network.patch_embed.proj.parameters()
    mean, std, our_mean, our_std = (torch.tensor(v) for v in (*images.values(), *ours.values()))
    if kernel.shape[1] == 1:  # the luminance has the averages
        mean, std, our_mean, our_std = (values.mean(dim=0, keepdim=True) for values in (mean, std, our_mean, our_std))
    bias += torch.einsum("dcij,c->d", kernel, (our_mean - mean) / std)
    kernel *= (our_std / std)[:, None, None]
    taken = ", ".join(f"{name} {' '.join(f'{v:.3f}' for v in values)}" for name, values in images.items())
    distributed.print_once(f"{flag} {pretrained}: made for images of {taken}, now part of its patch embedding")
    return network


def start_from(student: FlexiViT, teacher: FlexiViT) -> None:
    """Give the student the teacher's weights, patch embedding and positions resized once (section 3.4).

    Raises:
        WeightMismatch: If they differ in anything else.
    """
    tensors = dict(teacher.state_dict())
    tensors["patch_embed.proj.weight"] = pi_resize(tensors["patch_embed.proj.weight"], student.patch_size)
    if "pos_embed" in tensors and teacher.grid != student.grid:
        tensors["pos_embed"] = zoom_positions(tensors["pos_embed"], teacher.grid, student.grid)
    if len(tensors.get("head.bias", ())) != student.head.out_features:  # other classes
        tensors |= {f"head.{name}": value for name, value in student.head.state_dict().items()}
    load_completely(student, tensors, "the teacher")
