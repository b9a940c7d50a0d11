"""Names that other libraries give the tensors of the same networks. Ours are those of timm and of the papers' files."""

import re
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

TORCHVISION_VIT = {
    r"^class_token$": "cls_token",
    r"^encoder\.pos_embedding$": "pos_embed",
    r"^conv_proj\.": "patch_embed.proj.",
    r"^encoder\.ln\.": "norm.",
    r"^encoder\.layers\.encoder_layer_(\d+)\.": r"blocks.\1.",
    r"\.ln_([12])\.": r".norm\1.",
    r"\.self_attention\.in_proj_": ".attn.qkv.",
    r"\.self_attention\.out_proj\.": ".attn.proj.",
    r"\.mlp\.(?:0|linear_1)\.": ".mlp.fc1.",
    r"\.mlp\.(?:3|linear_2)\.": ".mlp.fc2.",
}
# nn.Sequential of a torchvision ResNet's children
RESNET_CHILDREN = {r"^0\.": "conv1.", r"^1\.": "bn1."} | {rf"^{i + 3}\.": f"layer{i}." for i in (1, 2, 3, 4)}
TRANSFORMERS_VIT = {  # ViT, ViTMSN and DINOv2, in files and in memory; see join_qkv
    r"^\w+\.(?=embeddings\.|encoder\.|layers\.|layernorm\.)": "",  # of a network with a task: vit., dinov2.
    r"^embeddings\.position_embeddings$": "pos_embed",
    r"^embeddings\.patch_embeddings\.projection\.": "patch_embed.proj.",
    r"^embeddings\.": "",
    r"^(?:encoder\.layer|layers)\.(\d+)\.": r"blocks.\1.",
    r"\.layernorm_before\.": ".norm1.",
    r"\.layernorm_after\.": ".norm2.",
    r"\.attention\.(?:attention\.)?([qkv])(?:uery|ey|alue|_proj)\.": r".attn.\1.",
    r"\.attention\.(?:output\.dense|o_proj)\.": ".attn.proj.",
    r"\.intermediate\.dense\.": ".mlp.fc1.",
    r"\.output\.dense\.": ".mlp.fc2.",
    r"\.layer_scale([12])\.lambda1$": r".ls\1.gamma",
    r"^layernorm\.": "norm.",
}
TO_TRANSFORMERS_VIT = {  # of a network that split_qkv has been through
    r"^(cls_token)$": r"embeddings.\1",
    r"^pos_embed$": "embeddings.position_embeddings",
    r"^patch_embed\.proj\.": "embeddings.patch_embeddings.projection.",
    r"^norm\.": "layernorm.",
    r"^blocks\.": "encoder.layer.",
    r"\.norm1\.": ".layernorm_before.",
    r"\.norm2\.": ".layernorm_after.",
    r"\.attn\.q\.": ".attention.attention.query.",
    r"\.attn\.k\.": ".attention.attention.key.",
    r"\.attn\.v\.": ".attention.attention.value.",
    r"\.attn\.proj\.": ".attention.output.dense.",
    r"\.mlp\.fc1\.": ".intermediate.dense.",
    r"\.mlp\.fc2\.": ".output.dense.",
}


def new_name(name: str, patterns: Iterable[tuple[str, str | Callable]]) -> str:
    """A name in which every pattern, in turn, is replaced."""
    for pattern, replacement in patterns:
        name = re.sub(pattern, replacement, name)
    return name


def renamed(tensors: Mapping[str, Tensor], patterns: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors under their :func:`new_name`."""
    return {new_name(name, patterns.items()): value for name, value in tensors.items()}


def join_qkv(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One layer ``attn.qkv`` in place of three layers ``attn.q``, ``attn.k`` and ``attn.v``."""
    joined = {}
    for name, value in tensors.items():
        if match := re.fullmatch(r"(.*attn\.)[qkv](\.\w+)", name):
            joined[f"{match[1]}qkv{match[2]}"] = torch.cat([tensors[f"{match[1]}{part}{match[2]}"] for part in "qkv"])
        else:
            joined[name] = value
    return joined


def split_qkv(tensors: Mapping[str, Tensor], within: str = "blocks") -> dict[str, Tensor]:
    """The inverse of :func:`join_qkv`, for the layers whose names begin with ``within``."""
    split = {}
    for name, value in tensors.items():
        if match := re.fullmatch(rf"({within}\..*attn\.)qkv(\.\w+)", name):
            split |= {f"{match[1]}{part}{match[2]}": t for part, t in zip("qkv", value.chunk(3), strict=True)}
        else:
            split[name] = value
    return split
