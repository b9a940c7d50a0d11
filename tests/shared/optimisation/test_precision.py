import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shared.optimisation.precision import Precision, fast_bf16
from tests.processes import run_processes

CPU = torch.device("cpu")


def weight_gradient(
    precision: Precision, size: tuple[int, int], kernel: int, stride: int, layout: torch.memory_format
) -> torch.Tensor:
    """Of a convolution, after memory that it might read has been filled with NaN."""
    random = torch.Generator().manual_seed(0)
    conv = nn.Conv2d(64, 64, kernel, stride, kernel // 2, bias=False)
    conv.weight.data.normal_(std=0.1, generator=random)
    images = torch.randn(8, 64, *size, generator=random)
    garbage = [torch.full((2**n,), torch.nan, dtype=torch.bfloat16) for n in range(8, 22)]
    del garbage
    with precision.autocast():
        maps = conv(images.contiguous(memory_format=layout))
    (maps.float() * torch.randn(maps.shape, generator=random)).sum().backward()
    return conv.weight.grad


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kernel", [1, 2, 3, 7])
@pytest.mark.parametrize(
    ("size", "stride"), [((1, 1), 2), ((2, 1), 2), ((8, 1), 2), ((3, 3), 4), ((1, 1), 1), ((4, 4), 2)]
)
def test_bf16_convolutions_on_a_cpu_have_the_gradients_of_float32(size, stride, kernel, layout):
    """On processors with bfloat16 units, those with a stride longer than the map would not."""
    expected = weight_gradient(Precision("fp32", CPU), size, kernel, stride, layout)
    found = [weight_gradient(Precision("bf16", CPU), size, kernel, stride, layout) for _ in range(3)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    torch.testing.assert_close(found[0], expected, rtol=0, atol=0.02 * expected.abs().max().item())


def test_other_convolutions_stay_in_bf16():
    with Precision("bf16", CPU).autocast():
        assert F.conv2d(torch.ones(1, 2, 4, 4), torch.ones(2, 2, 3, 3), stride=(2, 2)).dtype == torch.bfloat16
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == torch.bfloat16
    assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == torch.float32


def test_fp16_on_a_cpu_is_refused():
    with pytest.raises(ValueError, match="--amp fp16 needs a GPU"):
        Precision("fp16", CPU)


@pytest.mark.parametrize(
    ("cpu", "amx", "avx512_bf16", "avx512_fp16", "fast"),
    [
        ("Haswell, Zen 3", False, False, False, False),
        ("Cooper Lake, Zen 4", False, True, False, True),
        ("Sapphire Rapids", True, True, True, True),
        ("Sapphire Rapids without AMX in a virtual machine", False, True, True, False),
    ],
)
def test_bf16_is_chosen_where_a_cpu_is_faster_in_it(monkeypatch, cpu, amx, avx512_bf16, avx512_fp16, fast):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_fp16": avx512_fp16}, raising=False)
    assert fast_bf16(CPU) is fast
    assert Precision("auto", CPU).name == ("bf16" if fast else "fp32")


def scales_after_an_overflow(rank: int) -> list[float]:
    """Scales of the loss after a step that overflows on the second process alone, before and after they are shared."""
    precision = Precision("fp32", CPU)
    precision.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    precision.backward((weight * (math.inf if rank else 1.0)).sum(), optimizer)
    precision.update()
    own = precision.scaler.get_scale()
    precision.share_scale()
    return [own, precision.scaler.get_scale()]


def test_processes_with_weights_of_their_own_keep_one_scale_of_the_loss():
    assert run_processes(scales_after_an_overflow, 2) == [[1024.0, 512.0], [512.0, 512.0]]
