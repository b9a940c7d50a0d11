"""Layers, networks and training of ResMLP against arrays measured on the reference."""

import re
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.data.mixup import mixup_target

from resmlp.main import parse_args
from resmlp.resmlp_models import Affine, Block, ResMLP
from shared.supervised.losses import distillation_loss
from shared.supervised.optimizer import build_timm_optimizer, build_timm_schedule, set_learning_rate
from tests.golden.golden_file import GoldenFile
from tests.golden.supervised import (
    base_loss,
    check_distillation,
    check_repeated_augmentation,
    distillation_cases,
)

GOLDEN = GoldenFile("resmlp")
CONFIG = GOLDEN.json("config")
MODELS = GOLDEN.cases("", "model")

assert_close = partial(torch.testing.assert_close, rtol=1e-4, atol=2e-5)


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
    GOLDEN.assert_checksums("block/gradcheck", gradients(block))


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
    GOLDEN.assert_checksums(f"{case}/gradcheck", gradients(network))


OPTIMIZERS = [case for case in GOLDEN.cases("opt/") if f"opt/{case}/losses" in GOLDEN]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_three_steps_of_an_optimizer(name):
    network, _ = network_of("model0")
    for block in network.blocks:
        block.drop_path.drop_prob = 0.0
    network.train()
    lr, weight_decay = GOLDEN["opt/lr_wd"].tolist()
    optimizer = build_timm_optimizer(network, name, lr, weight_decay, eps=1e-8)
    name_of = {parameter: parameter_name for parameter_name, parameter in network.named_parameters()}
    for kept, key in ((True, "opt/names_wd1"), (False, "opt/names_wd0")):
        groups = [g for g in optimizer.param_groups if (g["weight_decay"] > 0) is kept]
        assert sorted(name_of[p] for g in groups for p in g["params"]) == sorted(GOLDEN[key].tolist())
    losses = []
    for step in range(len(GOLDEN[f"opt/{name}/losses"])):
        images, labels = GOLDEN.tensor(f"opt/x{step}"), GOLDEN.tensor(f"opt/y{step}")
        loss = F.cross_entropy(network(images), labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    np.testing.assert_allclose(losses, GOLDEN[f"opt/{name}/losses"], rtol=1e-4, atol=1e-5)
    GOLDEN.assert_checksums(f"opt/{name}/params", dict(network.named_parameters()))


@pytest.mark.parametrize("key", distillation_cases(GOLDEN))
def test_distillation(key):
    check_distillation(GOLDEN, key)


def test_gradients_of_distillation():
    logits, logits_kd = (GOLDEN.tensor(f"distill/{name}").requires_grad_() for name in ("outputs", "outputs_kd"))
    teacher, tau = GOLDEN.tensor("distill/teacher_logits"), CONFIG["at"][-1][1]
    distillation_loss(base_loss(GOLDEN, "soft_target", logits), logits_kd, teacher, "soft", 0.5, tau).backward()
    assert_close(logits.grad, GOLDEN.tensor("distill/grad_outputs_soft"))
    assert_close(logits_kd.grad, GOLDEN.tensor("distill/grad_outputs_kd_soft"))


@pytest.mark.parametrize("case", GOLDEN.cases("rasampler/"))
def test_repeated_augmentation(case, monkeypatch):
    check_repeated_augmentation(GOLDEN, case, monkeypatch)


@pytest.mark.parametrize("case", GOLDEN.cases("mixup_target/"))
def test_mixed_labels(case):
    lam, smoothing = map(float, re.fullmatch(r"lam([\d.]+)_smooth([\d.]+)", case).groups())
    found = mixup_target(GOLDEN.tensor("distill/labels"), CONFIG["ncls"], lam, smoothing)
    assert_close(found, GOLDEN.tensor(f"mixup_target/{case}"))


@pytest.mark.parametrize("case", GOLDEN.cases("lr_per_epoch/"))
def test_learning_rate_of_every_epoch(case):
    peak, epochs, warmup_epochs, warmup_lr, min_lr = GOLDEN[f"lr_per_epoch/{case}/args_f64"].tolist()
    flags = f"--data_path x --epochs {int(epochs)} --warmup-epochs {int(warmup_epochs)} --warmup-lr {warmup_lr}"
    args = parse_args([*flags.split(), "--min-lr", str(min_lr)])
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    scheduler = build_timm_schedule(args, optimizer)
    values = GOLDEN[f"lr_per_epoch/{case}/values_f64"]
    found = [set_learning_rate(scheduler, optimizer, epoch) for epoch in range(len(values))]
    np.testing.assert_allclose(found, values, rtol=1e-12)


def test_every_array_was_compared():
    assert GOLDEN.unread() == []
