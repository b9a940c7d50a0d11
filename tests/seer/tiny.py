"""The smallest runs of SEER, and its files of every published layout."""

from pathlib import Path

import torch
from torch import Tensor

from tests.run_folders import lines
from tests.tiny_training import Training

FLAGS = (
    "--arch regnet_test --nmb_crops 2 2 --size_crops 32 16 --min_scale_crops 0.3 0.1 --max_scale_crops 1 0.3 "
    "--hidden_mlp 8 --feat_dim 4 --nmb_prototypes 6 --batch_size 4 --passes 2 --log_freq 2 --saveckp_steps 1 "
    "--base_lr 4 --freeze_prototypes_niters 3 --device cpu --num_workers 0 --eval_knn_freq 0 --pictures off --amp fp32"
)


def add_small_size() -> None:
    """Make a network of three stages known: 8, 16 and 40 channels."""
    from seer.regnet import SIZES, Sizes

    SIZES["regnet_test"] = Sizes(4, 8, 10.3, 2.3, 4)


def train(output_dir, *flags) -> list[dict]:
    """Lines of the log of a training in this process."""
    from seer import main_seer

    add_small_size()
    arguments = [*FLAGS.split(), "--output_dir", str(output_dir), *map(str, flags)]
    main_seer.train_seer(main_seer.parse_args(arguments))
    return lines(output_dir)


def small_network(sizes=None, **options):
    """Filled with noise everywhere, running statistics too."""
    from seer.regnet import SIZES, RegNet

    add_small_size()
    torch.manual_seed(0)
    network = RegNet(sizes or SIZES["regnet_test"], **options)
    for name, value in network.state_dict().items():
        if value.is_floating_point():
            value.uniform_(0.5, 1.5) if "running_var" in name else value.normal_(std=0.2)
    return network.eval()


def official(tensors: dict[str, Tensor], grouped: bool = False) -> dict[str, dict[str, Tensor]]:
    """Trunk and heads of our tensors by their published names, by those of groups of blocks where asked for."""
    from seer.convert_checkpoint import to_official

    model: dict[str, dict[str, Tensor]] = {"trunk": {}, "heads": {}}
    for name, value in tensors.items():
        part, theirs = to_official(name)
        if grouped and ".block" in theirs:
            res, block = theirs.index(".block"), theirs.split(".")[2]
            theirs = f"{theirs[:res]}.{block.split('-')[0]}-part0{theirs[res:]}"
        model[part][theirs] = value
    return model


def consolidated(model: dict) -> dict:
    return {"classy_state_dict": {"base_model": {"model": model}}, "type": "consolidated"}


def write_sliced(path: Path, model: dict) -> None:
    folder, names = path.with_suffix(""), {}
    folder.mkdir()
    for part, tensors in model.items():
        names[part] = {name: f"{folder.name}/{name}.torch" for name in tensors}
        for name, value in tensors.items():
            torch.save(value.clone(), folder / f"{name}.torch")
    torch.save(consolidated(names) | {"type": "sliced"}, path)


def write_sharded(path: Path, model: dict, count: int = 3) -> None:
    """Parameters flat and padded, in pieces; buffers whole in every shard; wrappers in all names."""
    for rank in range(count):
        held: dict[str, dict[str, Tensor]] = {}
        for part, tensors in model.items():
            held[part] = {}
            for name, value in tensors.items():
                if not name.endswith(("running_mean", "running_var", "num_batches_tracked")):
                    size = -(-value.numel() // count)
                    padded = torch.nn.functional.pad(value.flatten(), (0, size * count - value.numel()))
                    value = padded[rank * size : (rank + 1) * size].clone()
                held[part][name.replace("_feature_blocks.", "_feature_blocks._fsdp_wrapped_module.")] = value
        torch.save(consolidated(held) | {"type": "shard"}, path.with_name(f"{path.stem}_shard{rank}.torch"))
    names = [f"{path.stem}_shard{rank}.torch" for rank in range(count)]
    torch.save({"type": "sharded", "shards": names}, path)


SMALL_NETWORK = ("regnet_micro", {})
COMMON = {
    "module": "seer.main_seer",
    "flags": tuple(FLAGS.split()),
    "prepare": add_small_size,
    "whole": ("--arch", "regnet_micro"),
    "rounding": 0.02,
}
TRAININGS = {
    "seer": Training(
        **COMMON,
        pair=("--batch_size", "2"),
        launcher=("seer.run_with_submitit", "main"),
        job=("--passes", "20"),
    ),
    "seer, sharded": Training(**COMMON, pair=("--batch_size", "2", "--fsdp", "--recompute")),
}
