"""SwAV's training loop, optimiser and schedule against arrays measured on the reference.

Every size and case name comes from the file. The file does not hold temperature, epsilon, iterations and weight decay,
which are the same in all cases.
"""

import json
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.optimisation.schedules import cosine_schedule
from swav import losses, main_swav
from swav.larc import LARC
from swav.losses import EmbeddingQueue, PrototypeUsage, SwappedPrediction
from tests.golden.golden_file import GoldenFile
from tests.golden.small_resnet import small_resnet
from tests.loop_run import LoopRun

GOLDEN = GoldenFile("swav")
TEMPERATURE, EPSILON, SINKHORN_ITERATIONS, TRAIN_WEIGHT_DECAY = 0.1, 0.05, 3, 1e-4


def cases(prefix: str) -> list[str]:
    return [case for case in GOLDEN.cases("") if case.startswith(prefix)]


class Stub(nn.Module):
    """Gives the stored embeddings, one set per step."""

    def __init__(self, outputs: list[Tensor], prototypes: Tensor):
        super().__init__()
        self.outputs = nn.ParameterList(outputs)
        self.prototypes = nn.Linear(*reversed(prototypes.shape), bias=False)
        self.prototypes.weight.data.copy_(prototypes)
        self.step = 0

    def forward(self, views):
        embeddings = F.normalize(self.outputs[self.step], dim=1)
        self.step += 1
        return embeddings, self.prototypes(embeddings)


class Recorder:
    """Stands for the checkpointer: looks at the training after every step."""

    def __init__(self, network: nn.Module, queue: EmbeddingQueue):
        self.prototypes, self.queue = network.prototypes, queue
        self.gradients, self.weights, self.queues = [], [], []

    def after_step(self, epoch: int, step_in_epoch: int) -> None:
        weight = self.prototypes.weight
        self.gradients.append(torch.zeros_like(weight) if weight.grad is None else weight.grad.clone())
        self.weights.append(weight.detach().clone())
        if self.queue.is_used:
            self.queues.append(self.queue.embeddings.clone())


def train(
    case: str, network: nn.Module, optimizer, batches: list[list[Tensor]], tmp_path, monkeypatch
) -> SimpleNamespace:
    """The real train_one_epoch on one epoch of ``batches``; what the case's arrays are compared with."""
    steps, codes_per_step, batch_size, nmb_prototypes = GOLDEN[f"{case}/out/q"].shape
    frozen = [not gradient.any() for gradient in GOLDEN[f"{case}/out/grad_prototypes"]]
    queue = EmbeddingQueue(codes_per_step, 0, 1)  # never used
    if f"{case}/out/queue_after" in GOLDEN:
        queue = EmbeddingQueue(*GOLDEN[f"{case}/out/queue_after"].shape[1:])
    queue.has_started = True

    rows, codes = [], []
    sinkhorn = losses.sinkhorn_knopp

    def recorded(scores: Tensor, *args, **kwargs) -> Tensor:
        assert args == (EPSILON, SINKHORN_ITERATIONS)
        rows.append(len(scores))
        codes.append(sinkhorn(scores, *args, **kwargs))
        return codes[-1]

    monkeypatch.setattr(losses, "sinkhorn_knopp", recorded)
    run = LoopRun(tmp_path, steps, network=network)
    run.checkpointer = recorder = Recorder(network, queue)
    main_swav.train_one_epoch(
        network,
        SwappedPrediction(range(codes_per_step), TEMPERATURE, EPSILON, SINKHORN_ITERATIONS),
        queue,
        PrototypeUsage(nmb_prototypes),
        [(views, torch.zeros(batch_size), torch.arange(batch_size)) for views in batches],
        optimizer,
        GOLDEN[f"{case}/in/lr"],
        run,
        freeze_prototypes_niters=frozen.index(False) if False in frozen else steps,
    )
    loss = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    return SimpleNamespace(
        losses=torch.tensor(loss),
        rows=torch.tensor(rows),
        codes=torch.stack([q[-batch_size:] for q in codes]).unflatten(0, (steps, codes_per_step)),
        recorder=recorder,
    )


def compare(case: str, found: SimpleNamespace, loss_rtol: float, codes_atol: float, rtol: float, atol: float) -> None:
    def expected(name: str) -> Tensor:
        return GOLDEN.tensor(f"{case}/out/{name}")

    close = partial(torch.testing.assert_close, rtol=rtol, atol=atol)
    torch.testing.assert_close(found.losses, expected("loss"), rtol=loss_rtol, atol=0)
    torch.testing.assert_close(found.codes, expected("q"), rtol=1e-4, atol=codes_atol)
    assert torch.equal(found.rows, expected("sinkhorn_rows"))
    close(torch.stack(found.recorder.gradients), expected("grad_prototypes"))
    close(torch.stack(found.recorder.weights), expected("prototypes_after"))
    if found.recorder.queue.is_used:
        close(torch.stack(found.recorder.queues), expected("queue_after"))


@pytest.mark.parametrize("case", cases("loss_"))
def test_loss_codes_queue_and_gradients(case, tmp_path, monkeypatch):
    outputs = [GOLDEN.tensor(key) for key in GOLDEN.keys(f"{case}/in/z")]
    network = Stub(outputs, GOLDEN.tensor(f"{case}/in/prototypes"))
    optimizer = torch.optim.SGD(network.prototypes.parameters(), lr=0.0, fused=True)
    batches = [[torch.zeros(1)]] * len(outputs)  # the stub looks at nothing
    found = train(case, network, optimizer, batches, tmp_path, monkeypatch)
    compare(case, found, loss_rtol=1e-4, codes_atol=1e-6, rtol=1e-3, atol=1e-6)
    for i, output in enumerate(network.outputs):
        expected = GOLDEN.tensor(f"{case}/out/grad_z{i}")
        torch.testing.assert_close(output.grad, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("case", cases("train_"))
def test_training_follows_the_reference_step_by_step(case, tmp_path, monkeypatch):
    network = small_resnet(GOLDEN.state_dict("resnet_small/sd/"))
    optimizer = LARC(network.parameters(), lr=0.0, weight_decay=TRAIN_WEIGHT_DECAY)
    steps = len(GOLDEN[f"{case}/in/lr"])
    batches = [[GOLDEN.tensor(key) for key in GOLDEN.keys(f"{case}/in/x{step}_")] for step in range(steps)]
    found = train(case, network, optimizer, batches, tmp_path, monkeypatch)
    compare(case, found, loss_rtol=1e-3, codes_atol=5e-3, rtol=2e-3, atol=1e-4)
    head = network.projection_head
    columns = GOLDEN[f"{case}/out/head0_after"].shape[1]
    for name, value in {
        "conv1_after": network.conv1.weight,
        "head0_after": head[0].weight[:, :columns],
        "head_bn_bias_after": head[1].bias,
        "param_norms_after": torch.stack([p.norm() for p in network.parameters()]),
        "bn1_running_var_after": network.bn1.running_var,
    }.items():
        expected = GOLDEN.tensor(f"{case}/out/{name}")
        torch.testing.assert_close(
            value.detach(), expected, rtol=2e-3, atol=1e-4, msg=lambda m, name=name: f"{name} {m}"
        )


@pytest.mark.parametrize("case", cases("lr_schedule"))
def test_learning_rate_of_every_step(case):
    names = ("base_lr", "final_lr", "epochs", "iters_per_epoch", "warmup_epochs", "start_warmup")
    values = cosine_schedule(*(GOLDEN.scalar(f"{case}/in/{name}") for name in names))
    for name in ("lr", "lr_dcv2"):
        np.testing.assert_allclose(values, GOLDEN[f"{case}/out/{name}"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("case", cases("larc_"))
def test_larc(case):
    prefix = f"{case}/in/p_"
    names = [key.removeprefix(prefix) for key in GOLDEN.keys(prefix)]
    parameters = {name: nn.Parameter(GOLDEN.tensor(prefix + name)) for name in names}
    weight_decay = GOLDEN.scalar(f"{case}/in/weight_decay")
    optimizer = LARC(parameters.values(), lr=0.0, weight_decay=weight_decay, clip=case.endswith("clip1"))
    for step, lr in enumerate(GOLDEN[f"{case}/in/lr"].tolist()):
        optimizer.param_groups[0]["lr"] = lr
        for name, parameter in parameters.items():
            gradient = GOLDEN.tensor(f"{case}/in/g{step}_{name}")
            parameter.grad = None if name == "none_g" and step < 2 else gradient
        optimizer.step()
        for name, parameter in parameters.items():
            expected = GOLDEN.tensor(f"{case}/out/p{step}_{name}")
            torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-7)


def test_every_array_was_compared():
    assert [key for group in ("loss_", "train_", "lr_schedule", "larc_") for key in GOLDEN.unread(group)] == []
