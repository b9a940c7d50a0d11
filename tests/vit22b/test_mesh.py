"""Four processes on a mesh of two axes against one process: values, gradients, trainings, checkpoints, memory."""

import contextlib
import shutil
from collections.abc import Iterator
from functools import partial

import pytest
import torch

from shared.plan import make_plan, measure_pass
from tests.processes import run_processes
from tests.reliability.runs import write_images
from tests.run_folders import lines, losses, state_of, stopped_after
from tests.vit22b.tiny import train
from vit22b.mesh import OnMesh, build_on_mesh, clip_gradients_, open_mesh
from vit22b.ring import cheaper_way, ring_linear
from vit22b.scaled_vit import Patches, ScaledViT, Share, Switches

CPU = torch.device("cpu")
KINDS = {  # every switch once
    "parallel": Switches(),
    "unfused": Switches(fused=False, norm="layernorm_nobias", qkv_bias=True),
    "sequential": Switches(parallel=False, fused=False, out_bias=False),
    "plain": Switches(qk_norm=False, mlp_bias=False, qkv_bias=True, norm="layernorm"),
}


def small(switches: Switches, share: Share | None = None) -> ScaledViT:
    return ScaledViT(16, 2, 24, 4, 4, 16, 6, switches=switches, share=share)


def loss_of(logits: torch.Tensor) -> None:
    (logits.softmax(dim=1)[:, 0] - logits.sin().sum(dim=1)).mean().backward()


def two_steps(images: torch.Tensor, network: ScaledViT) -> None:
    """The classifier starts at 0: the first step has gradients of nothing else."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(network(images))
        optimizer.step()


def on_mesh(rank: int, mesh: tuple[int, int], images: torch.Tensor) -> dict:
    torch.set_default_dtype(torch.double)
    device_mesh, found = open_mesh(*mesh, CPU), {}
    for kind, switches in KINDS.items():
        torch.manual_seed(0)
        network = build_on_mesh(partial(small, switches), device_mesh, CPU)
        memory = sum(p.to_local().numel() for p in network.parameters())
        own = images.chunk(mesh[0])[device_mesh["data"].get_local_rank()]
        two_steps(own, network)
        held = OnMesh(network)
        gradients = {name: held.whole(name, p.grad).clone() for name, p in held.named.items()}
        norm = clip_gradients_(network, 0.1)
        state = {name: tensor.clone() for name, tensor in held.state_dict().items()}
        found[kind] = [state, gradients, norm]
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.zero_()
        full = small(switches)
        held.load_state_dict(full.state_dict())
        found[kind].append(network(own).detach() - full(own).detach())
        found[kind].append(torch.tensor(memory))
    return found


@pytest.mark.parametrize("mesh", [(2, 2), pytest.param((1, 4), marks=pytest.mark.slow)])
def test_four_processes_on_a_mesh_are_equal_to_one(mesh):
    images = torch.randn(4, 3, 16, 16, dtype=torch.double)
    found = run_processes(on_mesh, 4, mesh, images)
    torch.set_default_dtype(torch.double)
    try:
        for kind, switches in KINDS.items():
            torch.manual_seed(0)
            network = small(switches)
            two_steps(images, network)
            state, gradients, *_ = found[0][kind]
            torch.testing.assert_close(state, dict(network.state_dict()), rtol=1e-9, atol=1e-11)
            expected = {name: p.grad for name, p in network.named_parameters()}
            torch.testing.assert_close(gradients, expected, rtol=1e-9, atol=1e-11)
            total = torch.nn.utils.get_total_norm(expected.values())
            for result in found:
                torch.testing.assert_close(result[kind][2], total)
                assert result[kind][3].abs().max() < 1e-12  # a state dict of one process is taken over
            assert list(state) == list(network.state_dict())

            def build(parts: int, switches: Switches = switches) -> ScaledViT:
                return small(switches, Share(0, parts))

            planned = make_plan(build, (3, 16, 16), 4, mesh).weights // 4
            largest = max(int(result[kind][4]) for result in found)
            assert largest == planned, kind
    finally:
        torch.set_default_dtype(torch.float)


def kept_bytes(rank: int, images: torch.Tensor) -> int:
    """Of all tensors that autograd keeps on a process of two, without parameters and images."""
    network = build_on_mesh(partial(small, Switches()), open_mesh(1, 2, CPU), CPU)
    kept: dict[int, torch.Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(address(t), t) is None or t, lambda t: t):
        network(images)
    own = {address(t) for t in (images, *(p.to_local() for p in network.parameters()))}
    return sum(t.untyped_storage().nbytes() for where, t in kept.items() if where not in own)


def address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def test_what_a_process_of_the_model_axis_keeps_is_what_was_planned():
    images = torch.randn(8, 3, 16, 16)
    with torch.device("meta"):
        planned = measure_pass(small(Switches(), Share(0, 2)), torch.empty_like(images, device="meta"))
        whole = measure_pass(small(Switches()), torch.empty_like(images, device="meta"))
    for found in run_processes(kept_bytes, 2, images):
        assert found == pytest.approx(planned.kept, rel=0.05)  # buffers of kernels differ
    assert planned.kept < 0.75 * whole.kept


@contextlib.contextmanager
def in_double() -> Iterator[None]:
    """Networks in float64: Adam makes large differences of rounding errors where gradients are nearly 0."""
    forward = Patches.forward
    torch.set_default_dtype(torch.double)
    Patches.forward = lambda self, images: forward(self, images.double())
    try:
        yield
    finally:
        Patches.forward = forward
        torch.set_default_dtype(torch.float)


def train_as_rank(rank: int, output_dir: str, flags: tuple, updates: int | None = None) -> None:
    """A training that ends like a killed one after so many updates."""
    with in_double(), stopped_after(updates) if updates else contextlib.nullcontext():
        train(output_dir, *flags)


def assert_same_weights(found: dict, expected: dict, **error: float) -> None:
    assert list(found["model"]) == list(expected["model"])
    torch.testing.assert_close(dict(found["model"]), dict(expected["model"]), **error)
    for i, values in expected["optimizer"]["state"].items():
        torch.testing.assert_close(found["optimizer"]["state"][i], values, **error)


def test_a_training_on_a_mesh_is_that_of_one_process_and_goes_on_with_and_without_it(tmp_path):
    write_images(tmp_path / "images/train")
    write_images(tmp_path / "images/val", count=9)
    data = ("--data_path", str(tmp_path / "images"), "--batch_size")
    on_mesh = (*data, "2", "--mesh", "2", "2")
    close, equal = {"rtol": 1e-6, "atol": 1e-8}, {"rtol": 0, "atol": 0}
    folders = {name: str(tmp_path / name) for name in ("alone", "mesh", "parts", "other", "single")}
    train_as_rank(0, folders["alone"], (*data, "8"))
    run_processes(train_as_rank, 4, folders["mesh"], on_mesh)
    assert losses(folders["mesh"]) == pytest.approx(losses(folders["alone"]), rel=1e-6)
    tested = [[line["test_loss"] for line in lines(folders[name]) if "test_loss" in line] for name in ("alone", "mesh")]
    assert tested[0] == pytest.approx(tested[1], rel=1e-6)
    alone, whole = state_of(folders["alone"]), state_of(folders["mesh"])
    assert_same_weights(whole, alone, **close)

    # stopped after four of six steps: goes on bit by bit on the mesh, and but for rounding on another one and alone
    run_processes(train_as_rank, 4, folders["parts"], on_mesh, 4)
    stopped = state_of(folders["parts"])
    assert (stopped["epoch"], stopped["step_in_epoch"]) == (1, 1)
    for name in ("other", "single"):
        shutil.copytree(folders["parts"], folders[name])
    run_processes(train_as_rank, 4, folders["parts"], on_mesh)
    assert_same_weights(state_of(folders["parts"]), whole, **equal)
    run_processes(train_as_rank, 2, folders["other"], (*data, "4", "--mesh", "1", "2"))
    train_as_rank(0, folders["single"], (*data, "8"))
    for name in ("other", "single"):
        assert_same_weights(state_of(folders[name]), alone, **close)


# --- Mistakes ---------------------------------------------------------------------------------------------------------


def error_on_mesh(rank: int, mesh: tuple[int, int], sizes: tuple) -> str:
    try:
        build_on_mesh(partial(ScaledViT, *sizes), open_mesh(*mesh, CPU), CPU)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("mesh", "sizes", "message"),
    [
        ((2, 1), (16, 1, 24, 4, 4, 16), ""),
        ((3, 1), (16, 1, 24, 4, 4, 16), "--mesh 3 1 is of 3 processes, and there are 2"),
        ((1, 2), (15, 1, 24, 3, 4, 16), "3 heads cannot be divided among 2 processes, the model axis of the mesh"),
        ((1, 2), (16, 1, 25, 4, 4, 16), "25 channels of the MLP cannot be divided among 2"),
        ((1, 2), (16, 1, 24, 4, 4, 12), "9 tokens cannot be divided among 2 processes"),
        ((2, 1), (15, 1, 24, 3, 4, 16), "a width of 15 cannot be divided among 2, the data axis of the mesh"),
    ],
)
def test_a_mesh_that_does_not_divide_is_named(mesh, sizes, message):
    for found in run_processes(error_on_mesh, 2, mesh, sizes):
        assert (message in found) if message else not found


# --- Ring -------------------------------------------------------------------------------------------------------------


def ring_gradients(rank: int, x: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
    found = []
    for by, dim in (("columns", 1), ("rows", 0)):
        own = [x.chunk(4, dim=-1)[rank].clone(), weight.chunk(4, dim=dim)[rank].clone()]
        y = ring_linear(*(tensor.requires_grad_() for tensor in own), by)
        y.sin().sum().backward()
        found += [y.detach(), *(tensor.grad for tensor in own)]
    return found


def test_the_ring_gives_values_and_gradients_of_the_whole_product():
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 8, dtype=torch.double), torch.randn(12, 8, dtype=torch.double)
    found = list(zip(*run_processes(ring_gradients, 4, x, weight), strict=True))
    x, weight = x.requires_grad_(), weight.requires_grad_()
    y = x @ weight.T
    y.sin().sum().backward()
    for values, dim in ((found[:3], 1), (found[3:], 0)):
        torch.testing.assert_close(torch.cat(values[0], dim=-1), y.detach())
        torch.testing.assert_close(torch.cat(values[1], dim=-1), x.grad)
        torch.testing.assert_close(torch.cat(values[2], dim=dim), weight.grad)
    assert (cheaper_way(8, 32), cheaper_way(32, 8)) == ("rows", "columns")


def ring_error(rank: int) -> str:
    with pytest.raises(ValueError) as error:
        ring_linear(torch.zeros(1, 2), torch.zeros(3, 2), "columns")
    return str(error.value)


def test_a_product_that_the_ring_cannot_share_is_named():
    assert run_processes(ring_error, 2)[0] == "3 outputs by 'columns' cannot be shared by 2 processes"
