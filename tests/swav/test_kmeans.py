import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from swav.kmeans import NOT_SEEN, MemoryBank, cluster_memory, spherical_kmeans
from tests.processes import run_processes


def unit_rows(rows: int, dim: int = 5, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def filled(rows: int, num_banks: int = 2) -> MemoryBank:
    memory = MemoryBank(30, num_banks, rows, 5)
    memory.write(0, torch.arange(rows) + 3, torch.stack([unit_rows(rows, seed=bank) for bank in range(num_banks)]))
    return memory


def test_heads_take_banks_in_turn_and_become_the_centroids():
    memory = filled(20)
    heads = [nn.Linear(5, k, bias=False) for k in (4, 3, 6)]
    orders = [torch.randperm(20, generator=torch.Generator().manual_seed(h)) for h in range(3)]
    assignments = cluster_memory(memory, heads, orders)
    for head, bank, order, found in zip(heads, (0, 1, 0), orders, assignments, strict=True):
        rows = memory.embeddings[bank]
        clusters, centroids = spherical_kmeans(rows, rows[order[: len(head.weight)]])
        assert torch.equal(found[3:23], clusters)
        assert (found[:3] == NOT_SEEN).all() and (found[23:] == NOT_SEEN).all()
        assert torch.equal(head.weight, centroids) and head.weight.requires_grad


def test_rows_that_are_not_finite_do_not_enter_the_memory():
    memory = filled(4)
    before = memory.embeddings.clone()
    new = torch.stack([unit_rows(2, seed=bank + 5) for bank in range(2)])
    new[1, 0, 2] = math.nan
    memory.write(1, torch.tensor([9, 8]), new)
    assert memory.indices.tolist() == [3, 4, 8, 6]
    assert torch.equal(memory.embeddings[:, [0, 1, 3]], before[:, [0, 1, 3]])
    assert torch.equal(memory.embeddings[:, 2], new[:, 1])


def save_and_load(rank: int) -> dict:
    memory = MemoryBank(12, 1, 2, 5)
    memory.write(0, torch.tensor([rank, rank + 10]), unit_rows(2, seed=rank)[None])
    memory.assignments = torch.zeros(2, 12, dtype=torch.int64)
    state = memory.state_dict()
    assert (state["embeddings"] is None) == (rank == 1)
    return state if rank == 0 else {"embeddings": memory.embeddings}


def test_the_memory_of_all_processes_is_gathered_on_the_first():
    state, second = run_processes(save_and_load, 2)
    assert state["indices"].tolist() == [[0, 10], [1, 11]]
    assert torch.equal(state["embeddings"][1], second["embeddings"])
    one = MemoryBank(12, 1, 4, 5)
    one.load_state_dict(state)
    assert not one.is_filled and one.assignments is None  # the state is that of two processes


def test_only_a_memory_of_the_same_shape_is_taken():
    memory = filled(4)
    memory.assignments = torch.ones(1, 30, dtype=torch.int64)
    state = memory.state_dict()
    same, other, of_other_images = MemoryBank(30, 2, 4, 5), MemoryBank(30, 2, 5, 5), MemoryBank(31, 2, 4, 5)
    for loading in (same, other, of_other_images):
        loading.load_state_dict(state)
    assert same.is_filled and torch.equal(same.embeddings, memory.embeddings)
    assert torch.equal(same.assignments, memory.assignments)
    assert not other.is_filled and not of_other_images.is_filled
    with pytest.raises(ValueError, match=r"\(2, 4, 5\)"):
        other.load_rows(state["indices"][0], state["embeddings"][0])
