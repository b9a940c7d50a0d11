"""What every folder says about its networks: published names, entries of torch.hub, files of every layout."""

import importlib
import re

import pytest
import safetensors.torch
import torch
from torch import Tensor

import hubconf
from shared.networks.pretrained import backbone_of, load_pretrained
from shared.networks.weights import DownloadError, WeightMismatch
from tests.networks import CARDS, SMALL, card_of, small_network

ENTRIES = {  # file below <NAME>_WEIGHTS_URL, millions of parameters
    "deepcluster_alexnet": ("alexnet/checkpoint.pth.tar", 58.3),
    "deepcluster_vgg16": ("vgg16/checkpoint.pth.tar", 134.3),
    "deepclusterv2_resnet50": ("deepclusterv2_800ep_pretrain.pth.tar", 23.5),
    "dino_resnet50": ("dino_resnet50_pretrain/dino_resnet50_pretrain.pth", 23.5),
    "dino_vitb16": ("dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth", 85.8),
    "dino_vitb8": ("dino_vitbase8_pretrain/dino_vitbase8_pretrain.pth", 85.8),
    "dino_vits16": ("dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth", 21.7),
    "dino_vits8": ("dino_deitsmall8_pretrain/dino_deitsmall8_pretrain.pth", 21.7),
    "dino_xcit_medium_24_p16": ("dino_xcit_medium_24_p16_pretrain/dino_xcit_medium_24_p16_pretrain.pth", 83.9),
    "dino_xcit_medium_24_p8": ("dino_xcit_medium_24_p8_pretrain/dino_xcit_medium_24_p8_pretrain.pth", 83.8),
    "dino_xcit_small_12_p16": ("dino_xcit_small_12_p16_pretrain/dino_xcit_small_12_p16_pretrain.pth", 25.9),
    "dino_xcit_small_12_p8": ("dino_xcit_small_12_p8_pretrain/dino_xcit_small_12_p8_pretrain.pth", 25.8),
    "msn_vitb16": ("vitb16_600ep.pth.tar", 85.8),
    "msn_vitb4": ("vitb4_300ep.pth.tar", 87.6),
    "msn_vitl16": ("vitl16_600ep.pth.tar", 303.3),
    "msn_vitl7": ("vitl7_200ep.pth.tar", 303.5),
    "msn_vits16": ("vits16_800ep.pth.tar", 21.7),
    "paws_resnet50": ("paws_imgnt_10percent_300ep.pth.tar", 23.5),
    "paws_resnet50_1percent": ("paws_imgnt_1percent_300ep.pth.tar", 23.5),
    "resmlpB_24": ("resmlpB_24_no_dist.pth", 129.1),
    "resmlp_12": ("resmlp_12_no_dist.pth", 15.35),
    "resmlp_24": ("resmlp_24_no_dist.pth", 30.0),
    "resmlp_36": ("resmlp_36_no_dist.pth", 44.7),
    "seer_10b": ("seer_regnet10B/model_iteration124500_conso.torch", 9323.93),
    "seer_10b_in1k": ("seer_finetuned/seer_10b_finetuned_in1k_model_phase28_conso.torch", 9323.93),
    "seer_128gf": (
        "swav_ig1b_regnet128Gf_cnstant_bs32_node16_sinkhorn10_proto16k_syncBN64_warmup8k/"
        "model_final_checkpoint_phase0.torch",
        637.42,
    ),
    "seer_128gf_in1k": ("seer_finetuned/seer_regnet128_finetuned_in1k_model_final_checkpoint_phase78.torch", 637.42),
    "seer_256gf": (
        "swav_ig1b_cosine_rg256gf_noBNhead_wd1e5_fairstore_bs16_node64_sinkhorn10_proto16k_apex_syncBN64_warmup8k/"
        "model_final_checkpoint_phase0.torch",
        1272.16,
    ),
    "seer_256gf_in1k": ("seer_finetuned/seer_regnet256_finetuned_in1k_model_final_checkpoint_phase38.torch", 1272.16),
    "seer_32gf": ("seer_regnet32d/seer_regnet32gf_model_iteration244000.torch", 141.33),
    "seer_32gf_in1k": ("seer_finetuned/seer_regnet32_finetuned_in1k_model_final_checkpoint_phase78.torch", 141.33),
    "seer_64gf": ("seer_regnet64/seer_regnet64gf_model_final_checkpoint_phase0.torch", 276.46),
    "seer_64gf_in1k": ("seer_finetuned/seer_regnet64_finetuned_in1k_model_final_checkpoint_phase78.torch", 276.46),
    "selav2_resnet50": ("selav2_400ep_pretrain.pth.tar", 23.5),
    "swav_resnet50": ("swav_800ep_pretrain.pth.tar", 23.5),
    "swav_resnet50w2": ("swav_RN50w2_400ep_pretrain.pth.tar", 93.9),
    "swav_resnet50w4": ("swav_RN50w4_400ep_pretrain.pth.tar", 375.4),
    "swav_resnet50w5": ("swav_RN50w5_400ep_pretrain.pth.tar", 586.5),
    "xcit_large_24_p16": ("xcit_large_24_p16_224.pth", 189.1),
    "xcit_large_24_p8": ("xcit_large_24_p8_224.pth", 188.9),
    "xcit_medium_24_p16": ("xcit_medium_24_p16_224.pth", 84.4),
    "xcit_medium_24_p8": ("xcit_medium_24_p8_224.pth", 84.3),
    "xcit_nano_12_p16": ("xcit_nano_12_p16_224.pth", 3.05),
    "xcit_nano_12_p8": ("xcit_nano_12_p8_224.pth", 3.05),
    "xcit_small_12_p16": ("xcit_small_12_p16_224.pth", 26.3),
    "xcit_small_12_p8": ("xcit_small_12_p8_224.pth", 26.2),
    "xcit_small_24_p16": ("xcit_small_24_p16_224.pth", 47.7),
    "xcit_small_24_p8": ("xcit_small_24_p8_224.pth", 47.6),
    "xcit_tiny_12_p16": ("xcit_tiny_12_p16_224.pth", 6.72),
    "xcit_tiny_12_p8": ("xcit_tiny_12_p8_224.pth", 6.71),
    "xcit_tiny_24_p16": ("xcit_tiny_24_p16_224.pth", 12.1),
    "xcit_tiny_24_p8": ("xcit_tiny_24_p8_224.pth", 12.1),
}
RELEASED = ("deepcluster", "dino", "msn", "paws", "resmlp", "seer", "swav", "xcit")  # folders with entries of torch.hub


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A folder in place of the published addresses; downloads go to an empty hub folder."""
    for method in CARDS:
        monkeypatch.setenv(f"{method.upper()}_WEIGHTS_URL", (tmp_path / "published").as_uri() + "/")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "published"


# --- Releases and entries ---------------------------------------------------------------------------------------------


def test_every_entry_is_known_here():
    names = {name for method in RELEASED for name in importlib.import_module(f"{method}.hub").ENTRIES}
    assert names == set(ENTRIES) and names <= set(dir(hubconf))


@pytest.mark.parametrize("entry", ENTRIES)
def test_entry_builds_offline_and_asks_for_its_file(entry, published):
    file, millions = ENTRIES[entry]
    with torch.device("meta"):
        network = getattr(hubconf, entry)(pretrained=False)
        assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, rel=0.003)
        with pytest.raises(DownloadError, match=re.escape(f"{published.as_uri()}/{file}")):
            getattr(hubconf, entry)()


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in tensors.items()}


# --- Files of any layout ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", CARDS)
def test_files_of_any_layout_fill_the_network_or_are_refused(method, tmp_path):
    card, network, (arch, options) = card_of(method), small_network(method), SMALL[method]
    state, images = backbone_of(network).state_dict(), torch.randn(2, options.get("in_chans", 3), 32, 32)
    sizes = {name: value for name, value in options.items() if name == "patch_size"}  # others come from the file
    layouts = {
        "training": {card.checkpoint_key: prefixed("module.backbone._orig_mod.", state), "epoch": 3},
        "Lightning": {"state_dict": prefixed("model.", state)},
    }
    if "img_size" in options:
        images = images[..., : options["img_size"], : options["img_size"]]
    safetensors.torch.save_file(state, tmp_path / "weights.safetensors")
    files = [tmp_path / "weights.safetensors"]
    for name, contents in layouts.items():
        files.append(tmp_path / f"{name}.pth")
        torch.save(contents, files[-1])
    for file in files:
        loaded = load_pretrained(card, arch, file, **sizes)
        assert torch.equal(loaded(images), network(images)), file
        assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())

    *_, (last, _) = backbone_of(network).named_parameters()
    torch.save({name: value for name, value in state.items() if name != last}, tmp_path / "part.pth")
    with pytest.raises(WeightMismatch, match=f"1 missing in the file: {re.escape(last)}"):
        load_pretrained(card, arch, tmp_path / "part.pth", **sizes)
    load_pretrained(card, arch, tmp_path / "part.pth", allow_partial=True, **sizes)
    with pytest.raises(WeightMismatch, match="has no --checkpoint_key ema; it holds one network"):
        load_pretrained(card, arch, tmp_path / "weights.safetensors", "ema", **sizes)
    with pytest.raises(ValueError, match=rf"{card.weights_flag} nowhere\.pth is neither a file nor a release"):
        load_pretrained(card, arch, "nowhere.pth", **sizes)
    with pytest.raises(ValueError, match=f"is not there: run python {card.main} first|is neither a file"):
        load_pretrained(card, arch, card.embedded_run, **sizes)
    assert load_pretrained(card, arch, "random", **options)(images).shape == network(images).shape
