import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dino.losses import DINOLoss
from tests.processes import run_processes


def make_loss(out_dim=12, num_crops=5, **kwargs) -> DINOLoss:
    options = {
        "warmup_teacher_temp": 0.04,
        "teacher_temp": 0.07,
        "warmup_teacher_temp_epochs": 3,
        "num_epochs": 5,
    }
    criterion = DINOLoss(out_dim, num_crops, **(options | kwargs))
    criterion.center.copy_(0.1 * torch.randn(1, out_dim, generator=torch.Generator().manual_seed(3)))
    return criterion


def make_logits(out_dim=12, num_crops=5, batch=3) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(num_crops * batch, out_dim), torch.randn(2 * batch, out_dim)


def pair_loop(student, teacher, center, num_crops, teacher_temp, student_temp=0.1):
    """Algorithm 1 with a loop over pairs of views, in double precision."""
    student, teacher = student.double().chunk(num_crops), teacher.double().chunk(2)
    total, pairs = 0.0, 0
    for i, t in enumerate(teacher):
        q = F.softmax((t - center.double()) / teacher_temp, dim=1)
        for v, s in enumerate(student):
            if v != i:
                total = total - (q * F.log_softmax(s / student_temp, dim=1)).sum(dim=1).mean()
                pairs += 1
    return total / pairs


@pytest.mark.parametrize("num_crops", [2, 3, 10])
@pytest.mark.parametrize("epoch, teacher_temp", [(0, 0.04), (1, 0.055), (4, 0.07)])
def test_loss_and_gradient_equal_those_of_a_loop_over_pairs(num_crops, epoch, teacher_temp):
    student, teacher = make_logits(num_crops=num_crops)
    student.requires_grad_()
    criterion = make_loss(num_crops=num_crops)
    expected = pair_loop(student, teacher, criterion.center.clone(), num_crops, teacher_temp)
    loss = criterion(student, teacher, epoch)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    (found,) = torch.autograd.grad(3 * loss, student)
    (gradient,) = torch.autograd.grad(3 * expected, student)
    torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-7)


def test_large_logits_do_not_overflow():
    student, teacher = (1e4 * logits for logits in make_logits())
    student.requires_grad_()
    criterion = make_loss()
    expected = pair_loop(student, teacher, criterion.center.clone(), 5, 0.07)
    loss = criterion(student, teacher, 4)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    loss.backward()
    assert student.grad.isfinite().all()


def test_centre_ignores_batches_that_are_not_finite():
    student, teacher = make_logits()
    criterion = make_loss()
    before = criterion.center.clone()
    teacher[0, 0] = math.nan
    criterion(student, teacher, 0)
    assert torch.equal(criterion.center, before)


def test_loss_splits_into_the_teachers_entropy_and_a_divergence():
    student, teacher = make_logits()
    criterion = make_loss()
    q = ((teacher.double() - criterion.center.double()) / 0.04).softmax(dim=1)
    loss = criterion(student, teacher, 0)
    entropy = -torch.special.xlogy(q, q).sum(dim=1).mean()
    torch.testing.assert_close(criterion.teacher_entropy.double(), entropy, rtol=0, atol=1e-5)
    assert loss > criterion.teacher_entropy


def test_low_precision_logits_give_the_float32_loss_of_their_values():
    student, teacher = (logits.bfloat16() for logits in make_logits())
    expected = make_loss()(student.float(), teacher.float(), 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        criterion = make_loss()
        loss = criterion(student.requires_grad_(), teacher, 0)
    assert loss.dtype == criterion.center.dtype == criterion.teacher_entropy.dtype == torch.float32
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert student.grad.dtype == torch.bfloat16


class LargeArrays(TorchDispatchMode):
    """Counts the arrays with at least so many elements that operations make (views do not count)."""

    def __init__(self, num_elements: int, inputs: list[torch.Tensor]):
        super().__init__()
        self.num_elements = num_elements
        self.storages = [t.untyped_storage() for t in inputs]  # alive, so that an address is not used twice
        self.made = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes() >= 4 * self.num_elements:
                storage = tensor.untyped_storage()
                if all(storage.data_ptr() != known.data_ptr() for known in self.storages):
                    self.storages.append(storage)
                    self.made += 1
        return output


def test_nothing_but_the_gradient_is_as_large_as_the_students_logits():
    student, teacher = make_logits(out_dim=64, num_crops=10)
    student.requires_grad_()
    criterion = make_loss(out_dim=64, num_crops=10)
    with LargeArrays(student.numel(), [student]) as arrays:
        loss = criterion(student, teacher, 0)
        (gradient,) = torch.autograd.grad(loss, student)
    assert gradient.shape == student.shape
    assert arrays.made == 1


def test_a_second_backward_pass_is_refused():
    student, teacher = make_logits()
    loss = make_loss()(student.requires_grad_(), teacher, 0)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def half_batch(rank: int) -> dict:
    student, teacher = make_logits(batch=4)
    rows = slice(2 * rank, 2 * rank + 2)
    student = student.unflatten(0, (5, 4))[:, rows].flatten(0, 1)
    teacher = teacher.unflatten(0, (2, 4))[:, rows].flatten(0, 1)
    criterion = make_loss()
    losses = [criterion(student, teacher, 0) for _ in range(2)]
    return {"losses": torch.stack(losses), "center": criterion.center}


def test_two_processes_share_the_centre_of_the_whole_batch():
    first, second = run_processes(half_batch, 2)
    criterion = make_loss()
    losses = torch.stack([criterion(*make_logits(batch=4), 0) for _ in range(2)])
    torch.testing.assert_close(first["center"], criterion.center)
    assert torch.equal(first["center"], second["center"])
    torch.testing.assert_close((first["losses"] + second["losses"]) / 2, losses)
