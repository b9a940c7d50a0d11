"""The pretended GPU fails where a GPU does, and only there."""

import copy
import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from tests.loop_run import LoopRun
from tests.pretended_gpu.device import OnGPU, pretended_gpu

FORKED = {"num_workers": 1, "multiprocessing_context": "fork"}


@pytest.fixture
def watch():
    with pretended_gpu() as watch:
        yield watch


def on_gpu(*shape: int) -> torch.Tensor:
    return torch.ones(shape, device="cuda")


MIXED = {
    "sum": lambda: on_gpu(3) + torch.ones(3),
    "sum with a number of the GPU": lambda: torch.ones(3) + on_gpu(),
    "in place": lambda: torch.ones(3).add_(on_gpu(3)),
    "into a number of the CPU": lambda: torch.zeros(()).add_(on_gpu()),
    "product": lambda: on_gpu(2, 3) @ torch.ones(3, 2),
    "network": lambda: nn.Linear(3, 2).to("cuda")(torch.ones(1, 3)),
    "network left on the CPU": lambda: nn.Linear(3, 2)(on_gpu(1, 3)),
    "a part brought to the CPU": lambda: torch.cat([on_gpu(3), on_gpu(3).cpu()]),
    "stacked numbers": lambda: torch.stack([on_gpu(), torch.ones(())]),
    "labels": lambda: F.cross_entropy(on_gpu(2, 3), torch.tensor([0, 1])),
    "rows of the CPU by numbers of the GPU": lambda: torch.ones(3)[torch.zeros(2, dtype=torch.long, device="cuda")],
    "values put into rows": lambda: on_gpu(3).__setitem__(torch.tensor([0, 1]), torch.ones(2)),
    "generator": lambda: torch.rand(3, device="cuda", generator=torch.Generator()),
}


@pytest.mark.parametrize("name", MIXED)
def test_tensors_of_two_devices_do_not_meet(name, watch):
    with pytest.raises(RuntimeError, match=r"same device|generator"):
        MIXED[name]()


def test_numpy_takes_no_tensor_of_a_gpu(watch):
    with pytest.raises(TypeError, match="cuda:0"):
        on_gpu(3).numpy()
    assert on_gpu(3).cpu().numpy().tolist() == [1, 1, 1]


MISSING = {
    "product of integers": lambda: on_gpu(2, 3).long() @ on_gpu(3, 2).long(),
    "resized bytes": lambda: F.interpolate(on_gpu(1, 3, 4, 4).byte(), size=(6, 6), mode="bilinear"),
    "pinned": lambda: on_gpu(3).pin_memory(),
    "loader process": lambda: next(iter(DataLoader([0], collate_fn=lambda _: on_gpu(3), **FORKED))),
}


@pytest.mark.parametrize("name", MISSING)
def test_what_a_cpu_can_and_a_gpu_cannot_is_an_error(name, watch):
    with pytest.raises(RuntimeError, match=r"not implemented|cannot pin|forked"):
        MISSING[name]()


FINE = {
    "a number of the CPU": lambda: on_gpu(3) * torch.tensor(2.0) + 1,
    "rows by numbers of the CPU": lambda: on_gpu(3)[torch.tensor([0, 2])],
    "copies": lambda: torch.ones(3).to("cuda").copy_(torch.ones(3)).cpu().cuda(),
    "made like another one": lambda: (
        torch.zeros_like(on_gpu(3)) + on_gpu(3).new_ones(3) + F.one_hot(on_gpu(3).long())[0, 0]
    ),
    "product of a vector": lambda: (on_gpu(3) @ on_gpu(3, 2)).add_(on_gpu(2)),
    "without gradients": lambda: torch.inference_mode()(lambda: nn.Linear(3, 2).to("cuda")(on_gpu(1, 3)))()[:, 1:],
}


@pytest.mark.parametrize("name", FINE)
def test_what_a_gpu_takes_is_fine(name, watch):
    result = FINE[name]()
    assert isinstance(result, OnGPU) and result.device == torch.device("cuda", 0) and result.shape == result.held.shape


def test_lists_are_read(watch):
    x = torch.arange(6.0, device="cuda").view(3, 2)
    assert x[[2, 0]].tolist() == [[4, 5], [0, 1]] and x[:, [1]].tolist() == [[1], [3], [5]]
    x[[0, 1], 0] = x.new_tensor([7, 8])
    assert x[:, 0].tolist() == [7, 8, 4] and x[np.array([2])].tolist() == [[4, 5]]


def test_memory_that_nobody_has_written_is_no_number(watch):
    assert torch.empty(2, device="cuda").isnan().all() and on_gpu(2).new_empty(3).isnan().all()
    with pytest.raises(IndexError):
        on_gpu(3)[torch.empty(1, dtype=torch.long, device="cuda")]


def test_a_network_learns_what_it_learns_on_a_cpu():
    def losses(device: str) -> list[float]:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
        weight = network[0].weight
        network, teacher = network.to(device), copy.deepcopy(network).to(device)
        assert network[0].weight is weight and weight.device.type == device
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.1, fused=True)
        images, found = torch.randn(4, 3, 8, 8).to(device), []
        for _ in range(3):
            optimizer.zero_grad()
            loss = F.mse_loss(network(images), teacher(images).detach())
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        state = io.BytesIO()
        torch.save(optimizer.state_dict(), state)
        state.seek(0)
        optimizer.load_state_dict(torch.load(state, map_location="cpu", weights_only=True))
        optimizer.step()
        return [*found, network(images).sum().item()]

    expected = losses("cpu")
    with pretended_gpu():
        assert losses("cuda") == pytest.approx(expected, rel=1e-5)
    assert losses("cpu") == expected  # it is gone


def test_files_say_that_their_tensors_come_from_a_gpu(tmp_path):
    file, plain = tmp_path / "file.pth", torch.Tensor
    with pretended_gpu():
        torch.save({"a": on_gpu(3), "b": torch.ones(3)}, file)
        kinds = [
            [type(tensor) for tensor in torch.load(file, where, weights_only=True).values()]
            for where in (None, "cuda", "cpu")
        ]
    assert kinds == [[OnGPU, plain], [OnGPU, OnGPU], [plain, plain]]
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.load(file, weights_only=True)


def test_batches_of_loader_processes_are_pinned(watch):
    batches = DataLoader(range(4), batch_size=2, pin_memory=True, **FORKED)
    assert [batch.cuda(non_blocking=True).tolist() for batch in batches] == [[0, 1], [2, 3]]


def test_autocast_computes_products_in_half_precision(watch):
    layer, images = nn.Linear(3, 2).to("cuda"), on_gpu(1, 3)
    with torch.autocast("cuda", torch.float16):
        scores = layer(images)
        assert scores.dtype == torch.float16 and scores.softmax(dim=1).dtype == torch.float32
        with torch.autocast("cuda", enabled=False):
            assert layer(images).dtype == torch.float32
    assert layer(images).dtype == torch.float32
    scores.sum().backward()
    assert layer.weight.grad.dtype == torch.float32


# --- Waits ------------------------------------------------------------------------------------------------------------

WAITING = {
    "a number": lambda x: x.sum().item(),
    "a condition": lambda x: bool((x > 0).all()),
    "a copy to the CPU": lambda x: x.cpu(),
    "a list": lambda x: x.tolist(),
    "rows by a condition": lambda x: x[x > 0],
    "values of another tensor where a condition holds": lambda x: x.__setitem__(x > 0, x.sum()),
    "rows by a list": lambda x: x[[0, 1]],
    "places": lambda x: x.nonzero(),
    "different values": lambda x: x.unique(),
    "a copy from the CPU": lambda x: torch.ones(3).to("cuda"),
    "a list from the CPU": lambda x: torch.tensor([1, 2], device="cuda"),
    "repetitions": lambda x: x.repeat_interleave(x.long()),
    "singular values": lambda x: torch.linalg.svdvals(x[None]),
    "what it says": lambda x: torch.cuda.synchronize(),
}
QUICK = {
    "arithmetic": lambda x: (x * 2 + torch.tensor(1.0)).clamp(min=0).sort(),
    "a copy that is not waited for": lambda x: torch.ones(3).to("cuda", non_blocking=True),
    "a number put where a condition holds": lambda x: x.__setitem__(x > 0, 1.0),
    "rows by a range": lambda x: x[1:].argmax(),
    "known repetitions": lambda x: x.repeat_interleave(x.long(), output_size=3),
    "conditions": lambda x: torch.where(x > 0, x, 0.0),
}


def waits_of(tmp_path, watch, action) -> list:
    run = LoopRun(tmp_path, steps_per_epoch=2, device="cuda", log_freq=100)
    x = on_gpu(3)
    action(x)  # between steps
    for _ in run.steps([(), ()]):
        action(x)
    action(x)
    return watch.waits


@pytest.mark.parametrize("name", WAITING)
def test_a_wait_within_a_step_is_seen(name, tmp_path, watch):
    first, second = waits_of(tmp_path, watch, WAITING[name])
    assert (first.logs, second.logs) == (False, True)  # the last step of a run ends with a line of the log


@pytest.mark.parametrize("name", QUICK)
def test_nothing_else_is_taken_for_a_wait(name, tmp_path, watch):
    assert not waits_of(tmp_path, watch, QUICK[name])
