"""DeepCluster-v2's memory, clustering and training against arrays measured on the reference, on one and two ranks."""

import pytest
import torch
from torch import Tensor

from shared.optimisation.larc import LARC
from shared.optimisation.precision import Precision
from swav import main_deepclusterv2
from swav.kmeans import MemoryBank, cluster_memory
from swav.resnet50 import MultiPrototypes
from tests.golden.golden_file import GoldenFile
from tests.golden.small_resnet import StoredEmbeddings, small_resnet
from tests.loop_run import LoopRun
from tests.processes import run_processes
from tests.run_folders import losses

GOLDEN = GoldenFile("deepcluster")
CASES = GOLDEN.cases("v2/", "cluster")
TEMPERATURE = 0.1


def filled_memory(embeddings: Tensor, indices: Tensor, num_images: int) -> MemoryBank:
    memory = MemoryBank(num_images, *embeddings.shape)
    memory.write(0, indices, embeddings)
    return memory


def centroids(case: str, suffix: str = "") -> list[Tensor]:
    keys = [key for key in GOLDEN.keys(f"v2/{case}/out/centroids") if key.endswith(suffix)]
    return [GOLDEN.tensor(key) for key in keys]


def cluster(embeddings: Tensor, indices: Tensor, sizes: list[int], num_images: int, starts: list[Tensor]):
    """Assignments and centroids; what lies in the heads before does not matter."""
    heads = MultiPrototypes(embeddings.shape[2], sizes).heads()
    assignments = cluster_memory(filled_memory(embeddings, indices, num_images), heads, starts)
    return assignments, [head.weight.detach() for head in heads]


@pytest.mark.parametrize("case", [case for case in CASES if f"v2/{case}/in/emb" in GOLDEN])
def test_clusters_of_one_process(case):
    wanted, wanted_centroids = GOLDEN.tensor(f"v2/{case}/out/assignments"), centroids(case)
    assignments, found = cluster(
        GOLDEN.tensor(f"v2/{case}/in/emb"),
        GOLDEN.tensor(f"v2/{case}/in/index"),
        [len(c) for c in wanted_centroids],
        wanted.shape[1],
        GOLDEN.tensors(f"v2/{case}/in/perm"),
    )
    assert torch.equal(assignments, wanted)
    torch.testing.assert_close(found, wanted_centroids, rtol=0, atol=1e-5)


def cluster_share(rank: int, embeddings: list[Tensor], indices: list[Tensor], *args):
    assignments, found = cluster(embeddings[rank], indices[rank], *args)
    return {"assignments": assignments, "centroids": found}


@pytest.mark.parametrize("case", [case for case in CASES if f"v2/{case}/in/emb_rank0" in GOLDEN])
def test_clusters_of_two_processes(case):
    wanted = GOLDEN.tensors(f"v2/{case}/out/assignments_rank")
    sizes = [len(c) for c in centroids(case, "_rank0")]
    found = run_processes(
        cluster_share,
        len(wanted),
        GOLDEN.tensors(f"v2/{case}/in/emb_rank"),
        GOLDEN.tensors(f"v2/{case}/in/index_rank"),
        sizes,
        wanted[0].shape[1],
        GOLDEN.tensors(f"v2/{case}/in/perm"),
    )
    for rank, result in enumerate(found):
        assert torch.equal(result["assignments"], wanted[rank])
        torch.testing.assert_close(result["centroids"], centroids(case, f"_rank{rank}"), rtol=0, atol=1e-5)


def test_an_epoch_follows_the_reference(tmp_path):
    case = "v2/train_epoch"
    batches = GOLDEN.tensor(f"{case}/in/batch_index")
    steps, batch_size = batches.shape
    sizes = [len(c) for c in centroids("train_epoch")]
    prototypes = MultiPrototypes(GOLDEN[f"{case}/in/mem_emb"].shape[2], sizes)
    network = StoredEmbeddings(GOLDEN.tensors(f"{case}/in/z"), prototypes)
    heads = network.prototypes.heads()
    wanted = GOLDEN.tensor(f"{case}/out/assignments")
    stored = GOLDEN.tensor(f"{case}/in/mem_emb"), GOLDEN.tensor(f"{case}/in/mem_index")
    memory = filled_memory(*stored, wanted.shape[1])
    memory.assignments = cluster_memory(memory, heads, GOLDEN.tensors(f"{case}/in/perm"))
    assert torch.equal(memory.assignments, wanted)

    main_deepclusterv2.train_one_epoch(
        network,
        memory,
        [([torch.zeros(1)], torch.zeros(batch_size), indices) for indices in batches],
        LARC(network.prototypes.parameters(), lr=0.0),
        GOLDEN[f"{case}/in/lr"],
        LoopRun(tmp_path, steps, network=network),
        crops_for_assign=list(range(len(memory.embeddings))),
        temperature=TEMPERATURE,
        freeze_prototypes_niters=steps,
    )
    torch.testing.assert_close(torch.tensor(losses(tmp_path)), GOLDEN.tensor(f"{case}/out/loss"), rtol=1e-4, atol=0)
    for i, output in enumerate(network.outputs):
        expected = GOLDEN.tensor(f"{case}/out/grad_z{i}")
        torch.testing.assert_close(output.grad, expected, rtol=1e-3, atol=1e-6)
    for head, expected in zip(heads, centroids("train_epoch"), strict=True):
        torch.testing.assert_close(head.weight.detach(), expected, rtol=0, atol=1e-5)
    assert torch.equal(memory.indices, GOLDEN.tensor(f"{case}/out/mem_index_after"))
    torch.testing.assert_close(memory.embeddings, GOLDEN.tensor(f"{case}/out/mem_emb_after"), rtol=1e-5, atol=1e-6)


def test_memory_is_filled_in_train_mode_and_crop_by_crop():
    case = "v2/init_memory"
    network = small_resnet(GOLDEN.state_dict(f"{case}/sd/"))
    indices = GOLDEN.tensor(f"{case}/in/index")
    crops = [GOLDEN.tensors(f"{case}/in/x{step}_") for step in range(len(indices))]
    loader = [([torch.cat(c)], torch.zeros(len(i)), i) for c, i in zip(crops, indices, strict=True)]
    memory = MemoryBank(0, *GOLDEN[f"{case}/out/mem_emb"].shape)
    precision = Precision("fp32", torch.device("cpu"))
    main_deepclusterv2.fill_memory(network, loader, memory, list(range(len(crops[0]))), precision)

    def close(found: Tensor, name: str) -> None:
        # batch norms of a few images magnify the rounding of convolutions, which depends on the layout of the images
        torch.testing.assert_close(found, GOLDEN.tensor(f"{case}/out/{name}"), rtol=1e-3, atol=2e-4)

    assert torch.equal(memory.indices, GOLDEN.tensor(f"{case}/out/mem_index"))
    close(memory.embeddings, "mem_emb")
    close(network.bn1.running_mean, "bn1_running_mean_after")
    with torch.no_grad():
        embeddings, scores = network.eval()(crops[0])
    close(embeddings, "emb_eval")
    for head, found in enumerate(scores):
        close(found, f"head{head}_scores")


def test_every_array_was_compared():
    assert GOLDEN.unread("v2/") == []
