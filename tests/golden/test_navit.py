"""Packing, positions, network, draws and losses of NaViT against arrays measured on the reference."""

import numpy as np
import pytest
import torch
from torch import Tensor

from navit.losses import contrastive_loss
from navit.native_resolution_vit import (
    Attention,
    NaViT,
    Packed,
    Positions,
    attention_among,
    block_mask,
    coordinates_of,
    patchify,
)
from navit.pack import first_fit
from navit.sampling import (
    beta_parameters,
    effective_resolution,
    fitting_size,
    rate_by_length,
    scheduled_rate,
    target_size,
)
from tests.golden.golden_file import GoldenFile

GOLDEN = GoldenFile("navit")
KINDS = ("segments", "mask")


def assert_close(found: Tensor, key: str, error: float) -> None:
    """Up to ``error`` times the largest value."""
    expected = GOLDEN.tensor(key)
    torch.testing.assert_close(found, expected, rtol=0, atol=error * max(1.0, float(expected.abs().max())))


# --- Packing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", GOLDEN.cases("pack/"))
def test_images_go_into_the_first_sequence_with_room(case):
    where = f"pack/{case}"
    config, lengths = GOLDEN.json(f"{where}/config"), GOLDEN[f"{where}/in/lengths"]
    length = config["sequence_length"]
    found = first_fit(lengths, length)
    np.testing.assert_array_equal(found.sequence, GOLDEN[f"{where}/out/sequence"])
    np.testing.assert_array_equal(found.offset, GOLDEN[f"{where}/out/offset"])
    before = [np.count_nonzero(found.sequence[:i] == s) for i, s in enumerate(found.sequence)]
    counts = np.array(before) < (config["max_images"] or np.inf)  # which this project leaves out: no shapes are fixed
    np.testing.assert_array_equal(counts, GOLDEN[f"{where}/out/kept_for_loss"])
    ids = np.zeros(found.shape, dtype=np.int16)
    for sequence, offset, n in zip(found.sequence, found.offset, lengths, strict=True):
        ids[sequence, offset : offset + n] = ids[sequence].max() + 1
    np.testing.assert_array_equal(ids, GOLDEN[f"{where}/out/segment_ids"])
    padding = 1 - len(found.slots) / ids.size
    assert padding == pytest.approx(GOLDEN.scalar(f"{where}/out/padding_fraction"), abs=1e-7)


@pytest.mark.parametrize("case", GOLDEN.cases("mask/"))
def test_tokens_attend_to_those_of_their_image(case):
    assert GOLDEN.json(f"mask/{case}/config")["pad_segment"] == 0
    found = block_mask(GOLDEN.tensor(f"mask/{case}/in/segment_ids"))
    assert torch.equal(found, GOLDEN.tensor(f"mask/{case}/out/mask"))


# --- Positions --------------------------------------------------------------------------------------------------------


def of_one_image(config: dict) -> Packed:
    """All tokens of an image, without pixels."""
    grid = config["rows"], config["cols"]
    return Packed.of([torch.empty(grid[0] * grid[1], 0)], [coordinates_of(*grid)], [grid])


@pytest.mark.parametrize("case", GOLDEN.cases("posemb/"))
def test_factorised_positions(case):
    where = f"posemb/{case}"
    config = GOLDEN.json(f"{where}/config")
    kind = {"fractional_aspect": "aspect"}.get(config["coordinates"], config["coordinates"])
    positions = Positions(1, config["combine"], kind, config["table_len"])
    positions.half_pixel = config.get("table_position", "").startswith("(r*n")
    for axis in "yx":
        setattr(positions, axis, torch.nn.Parameter(GOLDEN.tensor(f"{where}/in/table_{axis}")))
    image = of_one_image(config)
    assert_close(positions(image).detach(), f"{where}/out/posemb", 1e-6)
    if kind != "absolute":
        assert_close(positions.fractions(image).flip(1), f"{where}/out/coords_xy", 1e-6)


@pytest.mark.parametrize("case", GOLDEN.cases("fourier/"))
def test_fourier_positions(case):
    positions = Positions(2, "fourier", "fractional", 0)
    positions.weight = torch.nn.Parameter(GOLDEN.tensor(f"fourier/{case}/in/weight"))
    found = positions(of_one_image(GOLDEN.json(f"fourier/{case}/config"))).detach()
    assert_close(found, f"fourier/{case}/out/posemb", 1e-6)


# --- Network ----------------------------------------------------------------------------------------------------------


def parameters(prefix: str) -> dict[str, Tensor]:
    """The oracle's (in, out) matrices below a prefix under the network's names."""
    names = {"patch/w": "patch_embed.weight", "patch/b": "patch_embed.bias", "map/probe": "attn_pool.latent"}
    names |= {"pos_x": "pos_embed.x", "pos_y": "pos_embed.y", "q_scale": "q_norm.weight", "k_scale": "k_norm.weight"}
    names |= {"wo": "proj.weight", "bo": "proj.bias", "map/attn/": "attn_pool.", "map/": "attn_pool.", "wq": "q.weight"}
    names |= {"w1": "fc1.weight", "b1": "fc1.bias", "w2": "fc2.weight", "b2": "fc2.bias", "block": "blocks."}
    found = {}
    for key in GOLDEN.keys(prefix):
        name, value = key[len(prefix) :], GOLDEN.tensor(key)
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        name = {"head/w": "head.weight", "head/b": "head.bias"}.get(name, name).replace("/", ".")
        found[name + ".weight" * ("norm" in name.split(".")[-1])] = value.T if value.dim() == 2 else value
    for name in [name for name in found if name.endswith("q.weight")]:
        stem = name.removesuffix("q.weight")
        q, k, v = found.pop(name), found.pop(f"{stem}wk"), found.pop(f"{stem}wv")
        if stem == "attn_pool.":
            found |= {name: q, f"{stem}kv.weight": torch.cat([k, v])}
        else:
            found[f"{stem}qkv.weight"] = torch.cat([q, k, v])
    for name in ("pos_embed.x", "pos_embed.y"):
        if name in found:
            found[name] = found[name].T.contiguous()
    if "attn_pool.latent" in found:
        found["attn_pool.latent"] = found["attn_pool.latent"].T[None]
    return found


def norm_of(name: str) -> str:
    return name.removesuffix("_nobias")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", GOLDEN.cases("attention/"))
def test_attention_with_normalised_queries_and_keys(case, kind):
    where = f"attention/{case}"
    config, ids = GOLDEN.json(f"{where}/config"), GOLDEN.tensor(f"{where}/in/segment_ids")
    attention = Attention(config["width"], config["heads"], norm_of(config["qk_norm"]))
    attention.load_state_dict(parameters(f"{where}/params/"))
    slots = ids.flatten().nonzero()[:, 0]
    lengths = [int((row == i).sum()) for row in ids for i in range(1, int(row.max()) + 1)]
    assert sorted(lengths) == sorted(config["lengths"])
    tokens = GOLDEN.tensor(f"{where}/in/tokens").flatten(0, 1)[slots]
    found = attention(tokens, attention_among(kind, lengths, slots, tuple(ids.shape)))
    expected = GOLDEN.tensor(f"{where}/out/tokens_real_positions_only").flatten(0, 1)[slots]
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", GOLDEN.cases("encoder/"))
def test_packed_images_of_the_whole_network(case, kind):
    where = f"encoder/{case}"
    config = GOLDEN.json(f"{where}/config")
    options = {"num_classes": config["classes"], "hidden_dim": config["mlp_dim"], "norm": norm_of(config["norm"])}
    network = NaViT(
        config["width"], config["depth"], config["heads"], config["patch"], max_side=config["table_len"], **options
    )
    state = parameters(f"{where}/params/")
    p = config["patch"]
    state["patch_embed.weight"] = state["patch_embed.weight"].unflatten(1, (p, p, 3)).permute(0, 3, 1, 2)
    network.load_state_dict(state | {"choices": network.choices}, strict=True)
    network.attention = kind
    images = [GOLDEN.tensor(f"{where}/in/image{i}").permute(2, 0, 1) for i in range(len(config["kept_lengths"]))]
    kept = [GOLDEN.tensor(f"{where}/in/kept{i}") for i in range(len(images))]
    assert [len(k) for k in kept] == config["kept_lengths"]
    grids = [(image.shape[1] // p, image.shape[2] // p) for image in images]
    patches = [patchify(image, p)[k] for image, k in zip(images, kept, strict=True)]
    coords = [coordinates_of(*grid)[k] for grid, k in zip(grids, kept, strict=True)]
    places = first_fit(config["kept_lengths"], config["sequence_length"])
    packed = Packed.of(patches, coords, grids, torch.from_numpy(places.slots), places.shape)
    with torch.no_grad():
        tokens = dict(zip(packed.order, network.encode(packed).split(packed.lengths), strict=True))
        embeddings, logits = network.represent(packed), network(packed)
    for i in range(len(images)):
        assert_close(tokens[i], f"{where}/out/tokens{i}", 2e-6)
        assert_close(embeddings[i], f"{where}/out/embedding{i}", 2e-6)
        assert_close(logits[i], f"{where}/out/logits{i}", 2e-6)


@pytest.mark.parametrize("case", GOLDEN.cases("naflex_model/"))
def test_the_network_of_the_descendant(case):
    where = f"naflex_model/{case}"
    config = GOLDEN.json(f"{where}/config")
    patch = int((config["patch_dim"] // 3) ** 0.5)
    options = {"num_classes": config["num_classes"], "hidden_dim": config["mlp_dim"], "pool": config["pool_type"]}
    options |= {"positions": "table", "max_side": config["nposemb"], "qk_norm": False, "bias": True}
    network = NaViT(config["width"], config["depth"], config["num_heads"], patch, **options)
    network.load_state_dict(naflex_parameters(f"{where}/params/", patch) | {"choices": network.choices}, strict=True)
    real = GOLDEN.tensor(f"{where}/in/type") == 1
    patches, y, x = (GOLDEN.tensor(f"{where}/in/{name}") for name in ("patches", "yidx", "xidx"))
    coords = [torch.stack([y[i], x[i]], dim=1)[real[i]].long() for i in range(len(real))]
    packed = Packed.of([patches[i][real[i]] for i in range(len(real))], coords, list(map(tuple, config["grids"])))
    with torch.no_grad():
        embedded = network.embed(packed).split(packed.lengths)
        for i, tokens in zip(packed.order, embedded, strict=True):
            expected = GOLDEN.tensor(f"{where}/out/with_posemb")[i][real[i]]
            torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-6)
        assert_close(network.represent(packed), f"{where}/out/pre_logits", 1e-6)
        assert_close(network(packed), f"{where}/out/logits", 1e-6)


def naflex_parameters(prefix: str, patch: int) -> dict[str, Tensor]:
    names = {"Transformer/encoderblock_": "blocks.", "Transformer/encoder_norm": "norm", "MAPHead_0": "attn_pool"}
    names |= {"LayerNorm_0": "norm1", "LayerNorm_1": "norm2", "MlpBlock_0/Dense_0": "mlp.fc1", "/probe": ".latent"}
    names |= {
        "MlpBlock_0/Dense_1": "mlp.fc2",
        "MultiHeadDotProductAttention_0": "attn",
        "pos_embedding": "pos_embed.table",
    }
    names |= {"embedding/": "patch_embed.", "kernel": "weight", "scale": "weight", "/": "."}
    found = {}
    for key in GOLDEN.keys(prefix):
        name, value = key[len(prefix) :], GOLDEN.tensor(key)
        name = "pos_embed.table" if name == "pos_embedding" else name
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        if any(part in name for part in ("query", "key", "value")):
            value = value.flatten(1).T if name.endswith("weight") else value.flatten()
        elif name.endswith("out.weight"):
            value = value.flatten(0, 1).T
        elif name.endswith("weight") and value.dim() == 2:
            value = value.T
        name = name.replace("attn_pool.norm1", "attn_pool.norm").replace("attn_pool.attn", "attn_pool")
        found[name.replace(".out.", ".proj.")] = value
    for name in [name for name in found if ".query." in name]:
        q, k, v = (found.pop(name.replace("query", part)) for part in ("query", "key", "value"))
        if name.startswith("attn_pool"):
            found |= {name.replace("query", "q"): q, name.replace("query", "kv"): torch.cat([k, v])}
        else:
            found[name.replace("query", "qkv")] = torch.cat([q, k, v])
    weight = found["patch_embed.weight"]
    found["patch_embed.weight"] = weight.unflatten(1, (patch, patch, -1)).permute(0, 3, 1, 2)
    found["pos_embed.table"] = found["pos_embed.table"].reshape(*found["pos_embed.table"].shape[-3:])
    return found


@pytest.mark.parametrize("case", GOLDEN.cases("naflex_patchify/"))
def test_patches_of_the_descendant(case):
    where = f"naflex_patchify/{case}"
    image, patch = GOLDEN.tensor(f"{where}/in/image").permute(2, 0, 1), GOLDEN.json(f"{where}/config")["patch"]
    assert_close(patchify(image, patch), f"{where}/out/patches", 1e-6)
    coords = coordinates_of(image.shape[1] // patch, image.shape[2] // patch)
    expected = torch.stack([GOLDEN.tensor(f"{where}/out/{axis}idx") for axis in "yx"], dim=1)
    assert torch.equal(coords, expected.long()) and (GOLDEN[f"{where}/out/type"] == 1).all()


# --- Draws ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", GOLDEN.cases("beta_drop/"))
def test_rates_of_dropped_tokens_per_image(case):
    where = f"beta_drop/{case}"
    config = GOLDEN.json(f"{where}/config")
    assert config["variance_fraction"] == 0.3
    alpha, beta = beta_parameters(config["mean"], config["max"])
    deviation = config["max"] * (alpha * beta / (alpha + beta + 1)) ** 0.5 / (alpha + beta)
    for name, value in (("alpha", alpha), ("beta", beta), ("std_of_rate", deviation)):
        assert value == pytest.approx(GOLDEN.scalar(f"{where}/out/{name}_f64"), rel=1e-12)


@pytest.mark.parametrize("case", GOLDEN.cases("resolution_drop/"))
def test_rates_by_the_length_of_an_image(case):
    where = f"resolution_drop/{case}"
    config, lengths = GOLDEN.json(f"{where}/config"), GOLDEN[f"{where}/in/lengths"]
    assert (config["std"], config["reject_beyond_std"]) == (0.02, 2)
    found = rate_by_length(lengths, (config["s_min"], config["s_max"]), (config["d_min"], config["d_max"]))
    for name, value in zip(("mean", "low", "high"), found, strict=True):
        np.testing.assert_allclose(value, GOLDEN[f"{where}/out/{name}_f64"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", GOLDEN.cases("drop_schedule/"))
def test_rates_by_the_images_seen(case):
    where = f"drop_schedule/{case}"
    config, seen = GOLDEN.json(f"{where}/config"), GOLDEN[f"{where}/in/images_seen_f64"]
    found = scheduled_rate(seen, config["mu"], config["tau"], (config["rho_min"], config["rho_max"]))
    np.testing.assert_allclose(found, GOLDEN[f"{where}/out/rate_f64"], rtol=1e-12)


@pytest.mark.parametrize("case", GOLDEN.cases("resolution/"))
def test_effective_resolutions_and_the_sizes_that_follow(case):
    where = f"resolution/{case}"
    config = GOLDEN.json(f"{where}/config")
    u, sizes = GOLDEN[f"{where}/in/u_f64"], GOLDEN[f"{where}/in/hw"]
    found = effective_resolution(u, config["low"], config["high"], config["sample"])
    np.testing.assert_allclose(found, GOLDEN[f"{where}/out/effective_resolution_f64"], rtol=1e-12)
    targets = [[target_size(tuple(hw), resolution) for hw in sizes.tolist()] for resolution in found]
    np.testing.assert_allclose(targets, GOLDEN[f"{where}/out/target_hw_f64"], rtol=1e-12)


@pytest.mark.parametrize("case", GOLDEN.cases("naflex_size/"))
def test_the_largest_sizes_that_fit_into_so_many_tokens(case):
    where = f"naflex_size/{case}"
    config, sizes = GOLDEN.json(f"{where}/config"), GOLDEN[f"{where}/in/hw"].tolist()
    assert config["eps"] == 1e-5
    options = config["patch"], config["divisible_by_patch"]
    found = [[fitting_size(tuple(hw), length, *options) for hw in sizes] for length in config["max_lens"]]
    np.testing.assert_array_equal(found, GOLDEN[f"{where}/out/target_hw"])


# --- Losses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", GOLDEN.cases("contrastive/"))
def test_the_contrastive_loss_in_chunks_is_that_of_all_pairs(case):
    where = f"contrastive/{case}"
    config = GOLDEN.json(f"{where}/config")
    image, text, valid = (GOLDEN.tensor(f"{where}/in/{name}") for name in ("image", "text", "valid"))
    temperature = torch.tensor(config["temperature_multiplier"])
    for chunks in {1, 2, config["n_chunks"], 5, len(valid)}:
        found = contrastive_loss(image, text, valid, temperature, chunks)
        for name in ("loss", "loss_official_unmasked_subset"):
            assert found.item() == pytest.approx(GOLDEN.scalar(f"{where}/out/{name}"), rel=1e-6)


def test_every_array_was_compared():
    GOLDEN.json("provenance")
    assert not GOLDEN.unread()
