"""torch.compile for networks that are trained."""

import torch
from torch import nn

MOST_VERSIONS = 32  # of a network's code: batches of several sizes, with and without gradients


def compile_network(network: nn.Module, *methods: str, dynamic: bool | None = False) -> None:
    """Compile methods of a network in place; parameters keep their names.

    Compiling block by block takes half of the minutes, as equal blocks share their code, but the steps are then 7 %
    slower (ViT-S/16 in bfloat16 on a CPU): a training long enough to be compiled is better off with the whole network.
    Blocks that processes share out or compute again are compiled by themselves: FSDP2 and recomputation go around them.

    Args:
        methods: By default ``forward_backbone``, or ``forward`` of a network without it.
        dynamic: As for ``torch.compile``: False makes code for every resolution, None for two and then for any.
    """
    torch._dynamo.config.recompile_limit = max(MOST_VERSIONS, torch._dynamo.config.recompile_limit)
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # else the rest of a run would silently be eager
    for method in methods or ("forward_backbone" if hasattr(network, "forward_backbone") else "forward",):
        setattr(network, method, torch.compile(getattr(network, method), dynamic=dynamic))
