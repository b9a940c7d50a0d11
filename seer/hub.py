"""SEER's networks, its released weights and its images."""

from collections.abc import Mapping

from torch import Tensor

from shared.networks.card import Card, Release
from shared.networks.pretrained import hub_entries
from shared.networks.weights import WeightMismatch

from .convert_checkpoint import read_for_card
from .regnet import SIZES, RegNet, initialise_


def build(arch: str, in_chans: int = 3, img_size: int = 224, **options) -> RegNet:
    """A network of a published size with random weights: features (B, D), or logits with ``num_classes``."""
    if arch not in SIZES:
        raise ValueError(f"--arch {arch} is none of {', '.join(SIZES)}")
    network = RegNet(SIZES[arch], in_chans=in_chans, **options)
    return network if network.stem[0].weight.is_meta else initialise_(network)


def sizes(arch: str, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """No arguments of :func:`build`; ``WeightMismatch`` for the tensors of another network."""
    width = tensors.get("trunk_output.block1.block1-0.f.c.0.weight")
    if width is None:
        raise WeightMismatch(f"{arch}: another layout, without the blocks of a RegNet under torchvision's names")
    if arch in SIZES and len(width) != SIZES[arch].stages()[0].width:
        widths = {name: known.stages()[0].width for name, known in SIZES.items()}
        found = next((name for name, known in widths.items() if known == len(width)), "another RegNet")
        raise WeightMismatch(f"--pretrained holds a network of the width of {found}, not of --arch {arch}")
    return {}


IN1K = "seer_finetuned/seer_{}_finetuned_in1k_model_{}.torch"
FILES = {  # architecture, file, linear top-1
    "seer_32gf": ("regnet32Gf", "seer_regnet32d/seer_regnet32gf_model_iteration244000.torch", "74.0"),
    "seer_64gf": ("regnet64Gf_3", "seer_regnet64/seer_regnet64gf_model_final_checkpoint_phase0.torch", "75.3"),
    "seer_128gf": (
        "regnet128Gf",
        "swav_ig1b_regnet128Gf_cnstant_bs32_node16_sinkhorn10_proto16k_syncBN64_warmup8k/"
        "model_final_checkpoint_phase0.torch",
        "76.0",
    ),
    "seer_256gf": (
        "regnet256Gf_1",
        "swav_ig1b_cosine_rg256gf_noBNhead_wd1e5_fairstore_bs16_node64_sinkhorn10_proto16k_apex_syncBN64_warmup8k/"
        "model_final_checkpoint_phase0.torch",
        "77.5",
    ),
    "seer_10b": ("regnet10B", "seer_regnet10B/model_iteration124500_conso.torch", "79.8"),
}
FINETUNED = {  # the same with the accuracy after fine-tuning
    "seer_32gf_in1k": ("regnet32Gf", IN1K.format("regnet32", "final_checkpoint_phase78"), "83.4"),
    "seer_64gf_in1k": ("regnet64Gf_3", IN1K.format("regnet64", "final_checkpoint_phase78"), "84.0"),
    "seer_128gf_in1k": ("regnet128Gf", IN1K.format("regnet128", "final_checkpoint_phase78"), "84.5"),
    "seer_256gf_in1k": ("regnet256Gf_1", IN1K.format("regnet256", "final_checkpoint_phase38"), "85.2"),
    "seer_10b_in1k": ("regnet10B", IN1K.format("10b", "phase28_conso"), "85.8"),
}


def releases() -> dict[str, Release]:
    found = {}
    for what, files in (("linear", FILES), ("fine-tuned at 384 pixels", FINETUNED)):
        for name, (arch, file, top1) in files.items():
            doc = f"{arch}: features of SEER ({what} {top1} on ImageNet). Non-commercial licence."
            found[name] = Release(arch, file, doc, cached_as=f"{name}.torch")
    return found


CARD = Card(
    name="seer",
    build=build,
    releases=releases(),
    address="https://dl.fbaipublicfiles.com/vissl/model_zoo/",
    main="main_seer.py",
    interpolation="bilinear",
    checkpoint_key="model",
    head_names=("head",),
    sizes=sizes,
    convert=read_for_card,
)
MEAN, STD = CARD.mean, CARD.std
ENTRIES = hub_entries(CARD)
