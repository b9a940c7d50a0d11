"""The linear probe and the accuracies of the evaluations against arrays measured on the reference of SwAV."""

import zlib

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from shared.evaluation.linear import validate
from swav.eval_linear import RegLog, pool_windows
from tests.golden.golden_file import GoldenFile

GOLDEN = GoldenFile("swav")
MODES = {"global": (False, False), "avg6": (True, False), "avg6_bn": (True, True)}  # windows, batch norm


def hash_values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers in [-1, 1) that are a function of ``name`` and the position, see GOLDEN.md; float64."""
    i = np.arange(1, np.prod(shape, dtype=np.int64) + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        x = i * np.uint64(0x9E3779B97F4A7C15) + np.uint64(zlib.crc32(name.encode()) + 1) * np.uint64(0xBF58476D1CE4E5B9)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
        x ^= x >> np.uint64(31)
    return (2 * ((x >> np.uint64(11)).astype(np.float64) / 2**53) - 1).reshape(shape)


def hash_fill_(module: nn.Module, salt: str) -> None:
    """Set the entries of a state dict to their hash values, scaled by what they are."""
    for name, entry in module.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        s = hash_values(salt + name, tuple(entry.shape))
        if name.endswith("running_var"):
            s = 1 + 0.5 * (s + 1) / 2
        elif name.endswith("running_mean"):
            s = 0.1 * s
        elif entry.ndim >= 2:
            s = s * np.sqrt(3 / np.prod(entry.shape[1:]))
        else:
            s = 1 + 0.1 * s if name.endswith("weight") else 0.1 * s
        entry.copy_(torch.from_numpy(s))


def test_linear_probe_with_and_without_windows_and_batch_norm():
    feature_map = torch.from_numpy(hash_values("reglog_input", (2, 2048, 7, 7))).float().relu()
    num_labels = GOLDEN["reglog/out/global"].shape[1]
    GOLDEN["reglog/in/dummy"]
    for mode, (windows, use_bn) in MODES.items():
        features = pool_windows(feature_map) if windows else feature_map.mean(dim=(2, 3))
        classifier = RegLog(features.shape[1:], num_labels, use_bn)
        hash_fill_(classifier, f"{mode}:")
        with torch.no_grad():
            close(classifier.eval()(features), f"reglog/out/{mode}")
            if use_bn:
                close(classifier.train()(features), f"reglog/out/{mode}_train")


def close(value: Tensor, key: str) -> None:
    torch.testing.assert_close(value, GOLDEN.tensor(key), rtol=1e-3, atol=1e-5)


def test_accuracies():
    logits, targets = GOLDEN.tensor("accuracy/in/logits"), GOLDEN.tensor("accuracy/in/target")
    result = validate(nn.Identity(), nn.Identity(), TensorDataset(logits, targets), torch.device("cpu"), batch_size=4)
    for name in ("acc1", "acc5"):
        torch.testing.assert_close(
            torch.tensor([result[name]]), GOLDEN.tensor(f"accuracy/out/{name}"), rtol=0, atol=1e-4
        )


def test_every_array_of_the_evaluations_was_compared():
    assert not [key for case in ("reglog/", "accuracy/") for key in GOLDEN.unread(case)]
