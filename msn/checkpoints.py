"""Checkpoints of the pre-training under the names of the official ones."""

from torch import Tensor

NETWORK_FLAGS = ("model_name", "patch_size", "rand_size", "in_chans", "hidden_dim", "output_dim", "use_bn", "num_proto")


def to_official(state: dict) -> dict:
    """The state of a run under the names of the official checkpoints, whose encoders are wrapped for processes."""
    prefix = "module." if state["world_size"] > 1 else ""
    encoders = {
        key: {prefix + name: value for name, value in state[key].items()} for key in ("encoder", "target_encoder")
    }
    flags = state["args"]
    return {
        **state,
        **encoders,
        "prototypes": state["prototypes"]["0"],
        "loss": state["loss"]["value"],
        "batch_size": state["batch_size"] // state["world_size"],  # of one process
        "lr": flags["lr"],
        "temperature": flags["temperature"],
    }


def from_official(checkpoint: dict) -> dict:
    """The way back; files of the official code have neither flags nor a log.

    Raises:
        ValueError: If there are no prototypes.
    """
    if not isinstance(checkpoint.get("prototypes"), Tensor):
        raise ValueError(f"the checkpoint cannot be resumed, it has no prototypes: {', '.join(checkpoint)}")
    if "args" not in checkpoint and checkpoint["world_size"] > 1:
        checkpoint = checkpoint | {"opt": with_mean_gradient(checkpoint["opt"], checkpoint["world_size"])}
    return {
        **checkpoint,
        "prototypes": {"0": checkpoint["prototypes"]},
        "loss": {"value": checkpoint["loss"]},
        "batch_size": checkpoint["batch_size"] * checkpoint["world_size"],
    }


def with_mean_gradient(opt: dict, world_size: int) -> dict:
    """Adam's state with the moments of the prototypes' mean gradient over processes: the official code sums it."""
    (prototypes,) = opt["param_groups"][2]["params"]
    if prototypes not in opt["state"]:  # they were frozen
        return opt
    moments = opt["state"][prototypes]
    mean = {"exp_avg": moments["exp_avg"] / world_size, "exp_avg_sq": moments["exp_avg_sq"] / world_size**2}
    return opt | {"state": opt["state"] | {prototypes: moments | mean}}
