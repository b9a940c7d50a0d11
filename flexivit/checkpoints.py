"""Files that fill a FlexiViT: published ones, those of ``main.py``, and other ViTs'."""

import math
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shared.networks import pretrained as networks
from shared.networks.classifiers import load_completely
from shared.networks.names import new_name
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


def read_weights(pretrained: str | Path, flag: str = CARD.weights_flag) -> tuple[dict[str, Tensor], dict]:
    """Tensors of a release or a file, and arguments of :class:`FlexiViT` that go with it.

    Understood are the published ``.npz`` files, checkpoints of ``main.py``, and ViTs under timm's names, such as DINO's
    and MSN's, whose class token has a position: it is added to the token.

    Raises:
        WeightMismatch: If it holds no ViT, or one with parts that FlexiViT has not.
    """
    path = networks.locate(CARD, pretrained, flag)
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            tensors, gelu = from_npz(arrays), "tanh"
        num_heads = tensors["norm.weight"].numel() // 64
    else:
        checkpoint = safe_load(path)
        flags = flags_of_training(checkpoint)
        tensors = select_backbone_weights(checkpoint, CARD.checkpoint_key, str(pretrained)).tensors
        gelu = "tanh" if "grids" in flags else "none"
        num_heads = SIZES.get(str(flags.get("arch", "")).removeprefix("flexivit_"), (0, 0, 0))[2]
    tensors = {name: value for name, value in tensors.items() if name.split(".")[0] not in ("head_dist", "fc_norm")}
    return class_token_without_position(tensors, str(pretrained)), {"gelu": gelu, "num_heads": num_heads}


def class_token_without_position(tensors: dict[str, Tensor], origin: str) -> dict[str, Tensor]:
    """The same network with the position of its class token added to the token."""
    positions, token = tensors.get("pos_embed"), tensors.get("cls_token")
    if unknown := [name for name in tensors if re.search(r"\.ls\d|register|reg_token|q_norm", name)]:
        raise WeightMismatch(f"{origin}: {unknown[0]} belongs to a ViT of another kind")
    if positions is None or token is None or math.isqrt(positions.shape[1]) ** 2 == positions.shape[1]:
        return tensors
    return tensors | {"cls_token": token + positions[:, :1], "pos_embed": positions[:, 1:]}


def load_flexible(pretrained: str | Path, flag: str = CARD.weights_flag) -> FlexiViT:
    """A filled network of the size that its file tells, with the classifier if there is one, in evaluation mode."""
    tensors, options = read_weights(pretrained, flag)
    found = sizes(str(pretrained), tensors)
    width = tensors["norm.weight"].numel()
    depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    classes = len(tensors["head.bias"]) if "head.bias" in tensors else 0
    options["num_heads"] = options["num_heads"] or max(width // 64, 1)
    hidden_dim, in_chans = len(tensors["blocks.0.mlp.fc1.bias"]), tensors["patch_embed.proj.weight"].shape[1]
    network = FlexiViT(width, depth, num_classes=classes, hidden_dim=hidden_dim, in_chans=in_chans, **found, **options)
    load_completely(network, tensors, f"{flag} {pretrained}")
    return network.eval()


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
