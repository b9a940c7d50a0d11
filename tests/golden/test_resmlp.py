"""The layers and networks of ResMLP against arrays measured on the reference."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from resmlp.resmlp_models import Affine, Block, ResMLP
from tests.golden.golden_file import GoldenFile

GOLDEN = GoldenFile("resmlp")
CONFIG = GOLDEN.json("config")
MODELS = [case for case in GOLDEN.cases("") if case.startswith("model")]

assert_close = partial(torch.testing.assert_close, rtol=1e-4, atol=2e-5)


def assert_checksums(group: str, tensors: dict[str, torch.Tensor], atol: float = 1e-5) -> None:
    """Compare mean, standard deviation, norm and first four values of the named tensors."""
    names = GOLDEN[f"{group}/names"].tolist()
    assert sorted(names) == sorted(tensors)
    found = []
    for name in names:
        values = tensors[name].detach().double().flatten()
        first = F.pad(values[:4], (0, 4 - len(values[:4])))
        found.append([values.mean(), values.std(correction=0), values.norm(), *first])
    np.testing.assert_allclose(np.array(found), GOLDEN[f"{group}/values"], rtol=1e-4, atol=atol, err_msg=group)


def gradients(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in network.named_parameters()}


def network_of(case: str) -> tuple[ResMLP, int]:
    """A network with the weights of a case, and its number of classes."""
    img_size, patch_size, num_classes, dim, depth = GOLDEN[f"{case}/meta"].tolist()
    rates = GOLDEN[f"{case}/droppath_rates"]
    network = ResMLP(
        img_size,
        patch_size,
        num_classes=num_classes,
        embed_dim=dim,
        depth=depth,
        drop_path_rate=float(rates[0]),
        init_scale=GOLDEN.scalar(f"{case}/init_gamma"),
    )
    np.testing.assert_allclose([block.drop_path.drop_prob for block in network.blocks], rates)
    assert all((block.gamma_1 == GOLDEN.scalar(f"{case}/init_gamma")).all() for block in network.blocks)
    network.load_state_dict(GOLDEN.state_dict(f"{case}/sd/"), strict=True)
    return network, num_classes


def test_affine():
    affine = Affine(CONFIG["dim"])
    affine.load_state_dict(GOLDEN.state_dict("affine/sd/"), strict=True)
    assert_close(affine(GOLDEN.tensor("affine/x")), GOLDEN.tensor("affine/out"))


def test_block():
    block = Block(CONFIG["dim"], CONFIG["np"], layer_scale=1.0)
    block.load_state_dict(GOLDEN.state_dict("block/sd/"), strict=True)
    out = block.eval()(GOLDEN.tensor("affine/x"))
    assert_close(out, GOLDEN.tensor("block/out"))
    out.square().mean().backward()
    assert_checksums("block/gradcheck", gradients(block))


@pytest.mark.parametrize("case", MODELS)
def test_network(case):
    network, num_classes = network_of(case)
    images = GOLDEN.tensor(f"{case}/x")
    out = network.eval()(images)
    assert_close(out, GOLDEN.tensor(f"{case}/out"))
    assert_close(network.forward_features(images), GOLDEN.tensor(f"{case}/features"))
    if num_classes:
        loss = F.cross_entropy(out, torch.arange(len(images)) % num_classes)
    else:
        loss = out.square().mean()
    loss.backward()
    assert_checksums(f"{case}/gradcheck", gradients(network))


def test_every_array_was_compared():
    groups = ("config", "affine/", "block/", *(f"{case}/" for case in MODELS))
    assert [key for group in groups for key in GOLDEN.unread(group)] == []
