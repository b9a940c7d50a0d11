"""torch.compile for networks that are trained."""

import torch
from torch import nn

MOST_VERSIONS = 32  # of one block's code: views of several sizes, with and without gradients, first and last blocks


def compile_network(network: nn.Module, dynamic: bool | None = False) -> None:
    """Compile a network in place; its parameters keep their names.

    Blocks of one class (``network.blocks``) are compiled one at a time and share their code: compiling takes the time
    of a block instead of that of all, and only the step from one block to the next is not fused. Of other networks the
    method ``forward_backbone`` is compiled, where they have one, or all of them.

    Args:
        dynamic: As for ``torch.compile``: False makes code for every resolution, None for two and then for any.
    """
    torch._dynamo.config.recompile_limit = max(MOST_VERSIONS, torch._dynamo.config.recompile_limit)
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # else the rest of a run would silently be eager
    blocks = getattr(network, "blocks", None)
    if isinstance(blocks, nn.ModuleList | nn.Sequential) and len({type(block) for block in blocks}) == 1:
        for block in blocks:
            block.compile(dynamic=dynamic)
    elif hasattr(network, "forward_backbone"):
        network.forward_backbone = torch.compile(network.forward_backbone, dynamic=dynamic)
    else:
        network.compile(dynamic=dynamic)
