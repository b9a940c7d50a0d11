"""The tests of a real GPU, as far as they run in this process, are themselves right."""

import pytest

from tests.gpu import test_kernels
from tests.pretended_gpu.device import pretended_gpu

KERNELS = {
    "test_sinkhorn": {"scale": 100, "num_iters": 3},
    "test_nearest_neighbours": {"precision": "fp32"},
    "test_knn_classification": {},
    "test_kmeans_is_that_of_a_cpu_and_the_same_every_time": {},
    "test_spherical_kmeans_is_that_of_a_cpu_and_the_same_every_time": {},
}


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_of_the_gpu_suite(name):
    with pretended_gpu():
        getattr(test_kernels, name)(**KERNELS[name])


def test_all_of_them_are_here():
    assert set(KERNELS) == {name for name in vars(test_kernels) if name.startswith("test_")}
