"""Attention, block, network, schedule, loss and sharded products of ViT-22B against arrays of the reference."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from shared.plan import count_parameters
from tests.golden.golden_file import GoldenFile
from tests.processes import run_processes
from vit22b.main import learning_rate_factor, sigmoid_cross_entropy
from vit22b.ring import partial_products, ring_linear
from vit22b.scaled_vit import AttentionPool, Block, ScaledViT, Switches, fuse, unfuse

GOLDEN = GoldenFile("vit22b")


def assert_close(found: torch.Tensor, key: str, error: float = 2e-6) -> None:
    """Up to ``error`` times the largest value."""
    expected = GOLDEN.tensor(key)
    torch.testing.assert_close(found, expected, rtol=0, atol=error * float(expected.abs().max()))


SCALE = {"rmsnorm": "scale", "layernorm_nobias": "weight", "layernorm": "weight"}  # by the kind of norm


def block_state(prefix: str, norm: str) -> dict[str, torch.Tensor]:
    """Of the reference's matrices, each (inputs, outputs), our state dict."""
    get, scale = GOLDEN.tensor, SCALE[norm]
    names = {"q": "attn/wq", "k": "attn/wk", "v": "attn/wv", "attention_out": "attn/wo"}
    names |= {"mlp_in": "mlp/w1", "mlp_out": "mlp/w2"}
    state = fuse({ours: get(f"{prefix}/{theirs}").T for ours, theirs in names.items()})
    vectors = {f"norm.{scale}": "norm1", "attention_bias": "attn/bo", "hidden_bias": "mlp/b1", "mlp_bias": "mlp/b2"}
    vectors |= {f"q_norm.{scale}": "attn/q_scale", f"k_norm.{scale}": "attn/k_scale"}
    return state | {ours: get(f"{prefix}/{theirs}") for ours, theirs in vectors.items()}


@pytest.mark.parametrize("case", GOLDEN.families("qknorm", "qknorm_rms"))
def test_attention_with_normalised_queries_and_keys(case):
    config = GOLDEN.json(f"{case}/config")
    assert config["eps"] == 1e-6
    width, heads = config["width"], config["heads"]
    has_bias = config.get("out_bias", False)
    block = Block(width, heads, heads, Switches(norm=config["norm"], mlp_bias=False, out_bias=has_bias))
    params = {key[len(f"{case}/params/") :]: GOLDEN.tensor(key) for key in GOLDEN.keys(f"{case}/params/")}
    if "query/kernel" in params:  # (D, heads, d) and (heads, d, D)
        flat = {n: params[f"{n}/kernel"].flatten(1) for n in ("query", "key", "value")}
        *qkv, out = *flat.values(), params["out/kernel"].flatten(0, 1)
        scales = params["query_ln/scale"], params["key_ln/scale"]
    else:
        *qkv, out = (params[name] for name in ("wq", "wk", "wv", "wo"))
        scales = params["q_scale"], params["k_scale"]
    mlp = {"mlp_in": torch.zeros(heads, width), "mlp_out": torch.zeros(width, heads)}
    state = fuse({name: matrix.T for name, matrix in zip("qkv", qkv, strict=True)} | {"attention_out": out.T} | mlp)
    state |= {f"{n}_norm.{SCALE[config['norm']]}": scale for n, scale in zip("qk", scales, strict=True)}
    state |= {f"norm.{SCALE[config['norm']]}": torch.ones(width)}
    block.load_state_dict(state | ({"attention_bias": params["bo"]} if has_bias else {}))
    x = GOLDEN.tensor(f"{case}/in/x")
    found = block.attention(x.view(-1, *x.shape[-2:])).view(x.shape)
    assert_close(found, f"{case}/out/y")


@pytest.mark.parametrize("case", GOLDEN.cases("parallel_block/"))
@pytest.mark.parametrize("fused", [True, False])
def test_parallel_block_and_its_fused_products(case, fused):
    where = f"parallel_block/{case}"
    config = GOLDEN.json(f"{where}/config")
    assert config["fused_in_order"] == "q,k,v,mlp-in" and config["fused_out_order"] == "attention-out,mlp-out"
    switches = Switches(fused=fused, norm=config["norm"], gelu=config["gelu"])
    block = Block(config["width"], config["heads"], config["mlp_dim"], switches)
    state = block_state(f"{where}/params", config["norm"])
    block.load_state_dict(state)
    assert torch.equal(fuse(unfuse(state))["weight_in"], state["weight_in"])
    torch.testing.assert_close(block.weight_in.data.T, GOLDEN.tensor(f"{where}/out/fused_in_weight"), rtol=0, atol=0)
    torch.testing.assert_close(block.weight_out.data.T, GOLDEN.tensor(f"{where}/out/fused_out_weight"), rtol=0, atol=0)
    x = GOLDEN.tensor(f"{where}/in/x")[None]
    normed = block.norm(x)
    assert_close(normed[0], f"{where}/out/normed")
    assert_close(F.linear(normed, block.weight_in)[0], f"{where}/out/fused_first_product")
    assert_close(block.attention(normed)[0], f"{where}/out/attention_branch")
    assert_close(block.mlp(normed)[0], f"{where}/out/mlp_branch")
    assert_close(block(x)[0], f"{where}/out/y")


@pytest.mark.parametrize("case", GOLDEN.cases("model/"))
def test_network_and_loss(case):
    where = f"model/{case}"
    config = GOLDEN.json(f"{where}/config")
    assert not config["map_qk_norm"] and config["patch_order"] == "row, column, channel"
    network = ScaledViT(
        config["width"],
        config["depth"],
        config["mlp_dim"],
        config["heads"],
        config["patch"],
        config["image"],
        config["classes"],
        switches=Switches(norm=config["norm"], gelu=config["gelu"]),
    )
    get = lambda name: GOLDEN.tensor(f"{where}/params/{name}")  # noqa: E731
    kernel = get("patch/w").view(config["patch"], config["patch"], 3, config["width"]).permute(3, 2, 0, 1)
    state = {"patches.weight": kernel, "patches.bias": get("patch/b"), "patches.positions": get("pos")[None]}
    for i in range(config["depth"]):
        state |= {
            f"blocks.{i}.{name}": value
            for name, value in block_state(f"{where}/params/block{i}", config["norm"]).items()
        }
    scale = SCALE[config["norm"]]
    state |= {"pool.probe": get("map/probe"), f"pool.norm.{scale}": get("map/norm"), f"norm.{scale}": get("norm")}
    state["pool.kv.weight"] = torch.cat([get("map/attn/wk").T, get("map/attn/wv").T])
    matrices = {"pool.q": "map/attn/wq", "pool.proj": "map/attn/wo", "pool.fc1": "map/mlp/w1", "pool.fc2": "map/mlp/w2"}
    state |= {f"{ours}.weight": get(theirs).T for ours, theirs in (matrices | {"head": "head/w"}).items()}
    biases = {"pool.proj": "map/attn/bo", "pool.fc1": "map/mlp/b1", "pool.fc2": "map/mlp/b2", "head": "head/b"}
    network.load_state_dict(state | {f"{ours}.bias": get(theirs) for ours, theirs in biases.items()})
    images = GOLDEN.tensor(f"{where}/in/images").permute(0, 3, 1, 2)
    assert_close(network.encode(images), f"{where}/out/tokens", 5e-6)
    assert_close(network.represent(images), f"{where}/out/embedding", 5e-6)
    logits = network(images)
    assert_close(logits, f"{where}/out/logits", 5e-6)
    loss = sigmoid_cross_entropy(logits, GOLDEN.tensor(f"{where}/in/labels")).mean()
    assert_close(loss, f"{where}/out/sigmoid_loss")


@pytest.mark.parametrize("case", GOLDEN.cases("maphead/"))
def test_pooling_by_attention(case):
    where = f"maphead/{case}"
    config = GOLDEN.json(f"{where}/config")
    assert config["layernorm_eps"] == 1e-6
    switches = Switches(qkv_bias=True, norm="layernorm", gelu=config["gelu"])
    pool = AttentionPool(config["width"], config["heads"], config["mlp_dim"], switches)
    get = lambda name: GOLDEN.tensor(f"{where}/params/{name}")  # noqa: E731
    attention = "MultiHeadDotProductAttention_0"
    weights = {n: get(f"{attention}/{n}/kernel").flatten(1).T for n in ("query", "key", "value")}
    biases = {n: get(f"{attention}/{n}/bias").flatten() for n in ("query", "key", "value")}
    state = {"probe": get("probe")[0], "q.weight": weights["query"], "q.bias": biases["query"]}
    state |= {f"kv.{kind}": torch.cat([v["key"], v["value"]]) for kind, v in (("weight", weights), ("bias", biases))}
    state |= {"proj.weight": get(f"{attention}/out/kernel").flatten(0, 1).T, "proj.bias": get(f"{attention}/out/bias")}
    state |= {"norm.weight": get("LayerNorm_0/scale"), "norm.bias": get("LayerNorm_0/bias")}
    for ours, theirs in (("fc1", "Dense_0"), ("fc2", "Dense_1")):
        state[f"{ours}.weight"] = get(f"MlpBlock_0/{theirs}/kernel").T
        state[f"{ours}.bias"] = get(f"MlpBlock_0/{theirs}/bias")
    pool.load_state_dict(state)
    assert_close(pool(GOLDEN.tensor(f"{where}/in/x")), f"{where}/out/y")


@pytest.mark.parametrize("case", GOLDEN.families("sched", "sched_scenic"))
def test_learning_rate(case):
    config = GOLDEN.json(f"{case}/config")
    assert config.get("decay_type", "rsqrt") == "rsqrt"
    base = config.get("base", config.get("base_learning_rate"))
    sizes = (config["total_steps"], config["warmup_steps"], config["cooldown_steps"], config["timescale"])
    shift = config.get("shift", 0)
    found = [base * learning_rate_factor(int(step), *sizes, shift) for step in GOLDEN[f"{case}/in/steps"]]
    np.testing.assert_allclose(found, GOLDEN[f"{case}/out/lr"], rtol=1e-6, atol=1e-9 * base)


@pytest.mark.parametrize("case", GOLDEN.cases("sigmoid_xent/"))
def test_loss_of_several_labels(case):
    where = f"sigmoid_xent/{case}"
    assert GOLDEN.json(f"{where}/config")["reduction"] == "sum over classes, mean over images"
    found = sigmoid_cross_entropy(GOLDEN.tensor(f"{where}/in/logits"), GOLDEN.tensor(f"{where}/in/labels"))
    assert_close(found, f"{where}/out/per_image")
    assert_close(found.mean(), f"{where}/out/loss")


def both_rings(rank: int, x_shards: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
    """This process's output, by weights that are shared by their columns and by their rows."""
    world = len(x_shards)
    columns, rows = weight.chunk(world, dim=1)[rank], weight.chunk(world)[rank]
    return [ring_linear(x_shards[rank], part, by) for part, by in ((columns, "columns"), (rows, "rows"))]


@pytest.mark.parametrize("case", GOLDEN.cases("sharded_linear/"))
def test_products_whose_parts_travel_round_a_ring(case):
    where = f"sharded_linear/{case}"
    config, weight = GOLDEN.json(f"{where}/config"), GOLDEN.tensor(f"{where}/in/weight")
    x_shards = GOLDEN.tensor(f"{where}/in/x_shards")
    assert tuple(weight.shape) == (config["out_features"], config["in_features"])
    assert_close(partial_products(x_shards, weight), f"{where}/out/partial_products")
    found = run_processes(both_rings, config["devices"], x_shards, weight)
    for outputs in zip(*found, strict=True):
        assert_close(torch.stack(outputs), f"{where}/out/y_shards")


@pytest.mark.parametrize("case", GOLDEN.cases("param_count/"))
def test_number_of_parameters(case):
    config = GOLDEN.json(f"param_count/{case}/config")
    assert "q,k,v weight only; output projection weight+bias" in config["layout"]
    with torch.device("meta"):
        sizes = (config["width"], config["depth"], config["mlp_dim"], config["heads"])
        network = ScaledViT(*sizes, config["patch"], config["image"], config["classes"] or 0)
    assert count_parameters(network.blocks[0]) == GOLDEN.scalar(f"param_count/{case}/out/per_block")
    assert count_parameters(network.blocks) == GOLDEN.scalar(f"param_count/{case}/out/all_blocks")


def test_every_array_was_compared():
    assert GOLDEN.json("provenance")["oracle"]
    assert not GOLDEN.unread()
