"""The smallest run of ViT-22B's recipe."""

from tests.run_folders import lines
from tests.tiny_training import Training

FLAGS = (
    "--arch vit_test --input_size 16 --patch_size 4 --batch_size 4 --epochs 2 --num_workers 0 --log_freq 1 "
    "--pictures off --device cpu --saveckp_steps 1 --warmup_steps 2 --cooldown_steps 2 --timescale 10"
)


def add_small_size() -> None:
    """Make a network of two blocks of 32 channels known."""
    from vit22b.scaled_vit import SIZES

    SIZES["test"] = (32, 2, 48, 2)


def train(output_dir, *flags) -> list[dict]:
    """Lines of the log of a training in this process."""
    from vit22b import main

    add_small_size()
    main.train_vit22b(main.parse_args([*FLAGS.split(), "--output_dir", str(output_dir), *map(str, flags)]))
    return lines(output_dir)


def timm_state(block, fuse_out: bool) -> dict:
    """A block with biases everywhere, or without those of queries, keys and values, for timm's block of the same sizes.

    timm's first product has the MLP before queries, keys and values.
    """
    import torch

    dim = len(block.weight_out)
    state = {"in_proj.weight": block.weight_in.roll(-3 * dim, 0)}
    if block.qkv_bias is None:
        state["mlp_bias"] = block.hidden_bias
    else:
        state["in_proj.bias"] = torch.cat([block.hidden_bias, block.qkv_bias])
    for name, norm in (("in_norm", block.norm), ("q_norm", block.q_norm), ("k_norm", block.k_norm)):
        state |= {f"{name}.{kind.replace('scale', 'weight')}": value for kind, value in norm.named_parameters()}
    if fuse_out:
        state |= {"out_proj.weight": block.weight_out, "out_proj.bias": block.attention_bias + block.mlp_bias}
    else:
        attention, mlp = block.weight_out.tensor_split([dim], dim=1)
        state |= {"attn_out_proj.weight": attention, "attn_out_proj.bias": block.attention_bias}
        state |= {"mlp_out_proj.weight": mlp, "mlp_out_proj.bias": block.mlp_bias}
    return {name: value.detach() for name, value in state.items()}


SMALL_NETWORK = ("vit_micro", {"patch_size": 8, "img_size": 32})
TRAININGS = {
    "vit22b": Training(
        "vit22b.main",
        tuple(FLAGS.split()),
        pair=("--batch_size", "2"),
        prepare=add_small_size,
        whole=("--arch", "vit_micro"),
        launcher=("vit22b.run_with_submitit", "main"),
        job=("--epochs", "20"),
    ),
    "vit22b on a mesh": Training(
        "vit22b.main",
        tuple(FLAGS.split()),
        pair=("--batch_size", "2", "--mesh", "1", "2"),
        prepare=add_small_size,
        whole=("--arch", "vit_micro"),
    ),
}
