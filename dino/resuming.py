"""The layout of DINO's checkpoints."""

NETWORK_FLAGS = (
    "arch",
    "patch_size",
    "global_crop_size",
    "in_chans",
    "out_dim",
    "use_bn_in_head",
    "norm_last_layer",
    "optimizer",
)


def to_official(state: dict) -> dict:
    """The state of a run under the names of the official checkpoints, whose networks are wrapped for processes."""
    has_batchnorm = any(name.endswith("running_mean") for name in state["teacher"])  # else their teacher is not wrapped
    prefixes = {"student": "module.", "teacher": "module." if has_batchnorm else ""}
    return state | {
        network: {prefix + name: value for name, value in state[network].items()}
        for network, prefix in prefixes.items()
    }
