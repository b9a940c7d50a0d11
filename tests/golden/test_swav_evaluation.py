"""The linear probe and the accuracies of the evaluations against arrays measured on the reference of SwAV."""

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from shared.evaluation.linear import validate
from swav.eval_linear import RegLog, pool_windows
from tests.golden.golden_file import GoldenFile
from tests.golden.hash_fill import hash_filled, hash_input

GOLDEN = GoldenFile("swav")
MODES = {"global": (False, False), "avg6": (True, False), "avg6_bn": (True, True)}  # windows, batch norm


def test_linear_probe_with_and_without_windows_and_batch_norm():
    feature_map = hash_input("reglog_input", (2, 2048, 7, 7)).relu()
    num_labels = GOLDEN["reglog/out/global"].shape[1]
    GOLDEN["reglog/in/dummy"]
    for mode, (windows, use_bn) in MODES.items():
        features = pool_windows(feature_map) if windows else feature_map.mean(dim=(2, 3))
        classifier = RegLog(features.shape[1:], num_labels, use_bn)
        classifier.load_state_dict(hash_filled(classifier.state_dict(), salt=f"{mode}:"))
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
