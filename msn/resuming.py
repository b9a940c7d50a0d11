"""The layout of MSN's checkpoints."""

from pathlib import Path

from torch import Tensor

from shared.run.checkpoint import load_latest

NETWORK_FLAGS = ("model_name", "patch_size", "rand_size", "in_chans", "hidden_dim", "output_dim", "use_bn", "num_proto")
ENCODERS = ("encoder", "target_encoder")


def find_checkpoint(latest: Path, read_checkpoint: str | None, must_exist: bool) -> dict:
    """The newest state of this run, else the one to start from, else nothing.

    Raises:
        ValueError: If it was asked for and there is none.
    """
    checkpoint = load_latest(latest)
    if checkpoint is None and read_checkpoint is not None:
        checkpoint = load_latest(latest.parent / read_checkpoint)
        if checkpoint is None:
            raise ValueError(f"--read_checkpoint {read_checkpoint}: there is no such file in {latest.parent}")
    if checkpoint is None and must_exist:
        raise ValueError(f"--load_checkpoint true: there is no {latest}")
    return checkpoint or {}


class Value:
    """A number that a checkpoint keeps, such as the loss of the last complete epoch."""

    def __init__(self, value: float | None = None):
        self.value = value

    def state_dict(self) -> dict:
        return {"value": self.value}

    def load_state_dict(self, state: dict) -> None:
        self.value = state["value"]


def to_official(state: dict) -> dict:
    """The state of a run under the names of the official checkpoints, whose encoders are wrapped for processes."""
    prefix = "module." if state["world_size"] > 1 else ""
    encoders = {key: {prefix + name: value for name, value in state[key].items()} for key in ENCODERS}
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
    return {
        **checkpoint,
        "prototypes": {"0": checkpoint["prototypes"]},
        "loss": {"value": checkpoint["loss"]},
        "batch_size": checkpoint["batch_size"] * checkpoint["world_size"],
    }
