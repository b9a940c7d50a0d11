"""The small ResNets whose weights the golden files of SwAV hold, and a network whose embeddings they hold."""

import re

import torch.nn.functional as F
from torch import Tensor, nn

from swav.resnet50 import ResNet


def small_resnet(state: dict[str, Tensor], **kwargs) -> ResNet:
    """A network with the sizes of a state dict, filled with it."""
    blocks = [{key.split(".")[1] for key in state if key.startswith(f"layer{stage}.")} for stage in range(1, 5)]
    sets = [value.shape[0] for key, value in state.items() if re.fullmatch(r"prototypes\.prototypes\d+\.weight", key)]
    sizes = {
        "output_dim": state["projection_head.3.weight"].shape[0],
        "hidden_mlp": state["projection_head.0.weight"].shape[0],
        "nmb_prototypes": sets or state["prototypes.weight"].shape[0],
        "normalize": True,
    }
    network = ResNet([len(stage) for stage in blocks], width_per_group=len(state["conv1.weight"]), **sizes | kwargs)
    assert list(network.state_dict()) == list(state)
    network.load_state_dict(state)
    return network


class StoredEmbeddings(nn.Module):
    """Gives the stored embeddings, one set per step, and their scores."""

    def __init__(self, outputs: list[Tensor], prototypes: nn.Module):
        super().__init__()
        self.outputs, self.prototypes = nn.ParameterList(outputs), prototypes
        self.step = 0

    def forward(self, views):
        embeddings = F.normalize(self.outputs[self.step], dim=1)
        self.step += 1
        return embeddings, self.prototypes(embeddings)
