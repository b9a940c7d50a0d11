"""What folders of sentence-transformers say beside the weights: pooling, dense layers, norms, lengths and prompts.

``modules.json`` lists the steps from a text to its vector: a transformer, a pooling, perhaps dense layers, perhaps a
division by the norm. Steps that are not implemented here are refused by name, for without them the vectors are others.
"""

from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
from torch import Tensor, nn

from shared.distributed import print_once
from shared.networks.weights import safe_load

from .text.files import read_json, write_json

POOLINGS = {"average": "mean", "cls": "cls", "max": "max"}  # our names, and theirs
_OLD_POOLINGS = {  # of their older files, which have a switch for each
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU", "Sigmoid")
_PROMPTS = {"query": ("query",), "passage": ("document", "passage", "corpus")}  # our names, and theirs
_ONE_VECTOR = "sentence_embedding"  # their name of what a dense layer takes and gives


@dataclass
class Steps:
    """How a folder of sentence-transformers makes vectors.

    Attributes:
        transformer: Folder of its weights and tokenizer.
        pooling: One of ``POOLINGS``.
        max_length: Tokens that are read of a text; None: as many as the tokenizer says.
        lowercase: Whether texts are lowercased before they are tokenised.
        prompts: What is put before texts: ``query``, ``passage``, or neither (the empty name).
    """

    transformer: Path
    pooling: str = "average"
    projections: nn.Sequential = field(default_factory=nn.Sequential)
    normalized: bool = False
    max_length: int | None = None
    lowercase: bool = False
    prompts: dict[str, str] = field(default_factory=dict)


class Projection(nn.Module):
    """A dense layer and its activation."""

    def __init__(self, in_features: int, out_features: int, bias: bool, activation: str):
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias)
        self.activation = getattr(nn, activation)()

    def forward(self, vectors: Tensor) -> Tensor:
        return self.activation(self.linear(vectors))


def read_steps(folder: Path) -> Steps:
    """The steps of a folder; without ``modules.json`` those that Contriever has."""
    if not (folder / "modules.json").is_file():
        return Steps(folder)
    modules = [
        (module["type"].rpartition(".")[2], folder / module["path"]) for module in read_json(folder / "modules.json")
    ]
    kinds = [kind for kind, _ in modules if kind != "Dropout"]
    for kind in kinds:
        if kind not in ("Transformer", "Pooling", "Dense", "Normalize"):
            raise ValueError(f"{folder / 'modules.json'}: {kind} is not implemented")
    dense = kinds.count("Dense")
    if kinds not in (["Transformer", "Pooling"] + ["Dense"] * dense + end for end in ([], ["Normalize"])):
        raise ValueError(f"{folder / 'modules.json'}: steps in the order {', '.join(kinds)} are not implemented")
    paths = dict(modules)
    steps = Steps(paths["Transformer"], _read_pooling(paths["Pooling"]), normalized="Normalize" in kinds)
    steps.projections.extend(_read_projection(path) for kind, path in modules if kind == "Dense")
    transformer = read_json(paths["Transformer"] / "sentence_bert_config.json", {})
    steps.max_length, steps.lowercase = transformer.get("max_seq_length"), bool(transformer.get("do_lower_case"))
    whole = read_json(folder / "config_sentence_transformers.json", {})
    found = whole.get("prompts") or {}
    steps.prompts = {ours: next((found[n] or "" for n in names if n in found), "") for ours, names in _PROMPTS.items()}
    steps.prompts[""] = found.get(whole.get("default_prompt_name")) or ""
    unused = next((n for n in _PROMPTS["passage"] if found.get(n) and not steps.prompts["passage"]), None)
    if unused is not None:  # sentence-transformers adds an empty "document", which comes first, to what it saves
        print_once(
            f"NOTE: {folder}: passages get no prompt, as in sentence-transformers; --passage_prefix gives the one "
            f"called {unused!r}, {found[unused]!r}"
        )
    if any(steps.prompts.values()) and not read_json(paths["Pooling"] / "config.json").get("include_prompt", True):
        raise ValueError(f"{paths['Pooling'] / 'config.json'}: a pooling that leaves out prompts is not implemented")
    return steps


def write_steps(folder: Path, steps: Steps, dim: int) -> None:
    """Write them beside the weights in ``folder``; ``dim``: length of the vectors that are pooled."""
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    modules += [(f"{i}_Dense", "Dense") for i in range(2, 2 + len(steps.projections))]
    modules += [(f"{len(modules)}_Normalize", "Normalize")] if steps.normalized else []
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(modules)
    ]
    for path, _ in modules:
        (folder / path).mkdir(exist_ok=True, parents=True)
    write_json(folder / "modules.json", listed)
    switches = {switch: name == POOLINGS[steps.pooling] for switch, name in _OLD_POOLINGS.items()}
    write_json(folder / "1_Pooling/config.json", {"word_embedding_dimension": dim, **switches})
    for i, projection in enumerate(steps.projections, start=2):
        linear = projection.linear
        sizes = {"in_features": linear.in_features, "out_features": linear.out_features}
        activation = f"{type(projection.activation).__module__}.{type(projection.activation).__name__}"
        config = {**sizes, "bias": linear.bias is not None, "activation_function": activation}
        write_json(folder / f"{i}_Dense/config.json", config)
        tensors = {f"linear.{name}": value.contiguous() for name, value in linear.state_dict().items()}
        (folder / f"{i}_Dense/model.safetensors").write_bytes(safetensors.torch.save(tensors))
    length = {"max_seq_length": steps.max_length, "do_lower_case": steps.lowercase}
    write_json(folder / "sentence_bert_config.json", length)
    prompts = {names[0]: steps.prompts.get(ours, "") for ours, names in _PROMPTS.items()}
    default = {"default": steps.prompts[""]} if steps.prompts.get("") else {}
    write_json(
        folder / "config_sentence_transformers.json",
        {"prompts": prompts | default, "default_prompt_name": next(iter(default), None)},
    )


def _read_pooling(folder: Path) -> str:
    config = read_json(folder / "config.json")
    modes = config.get("pooling_mode")
    if modes is None:
        modes = [name for switch, name in _OLD_POOLINGS.items() if config.get(switch)]
    modes = [modes] if isinstance(modes, str) else list(modes)
    ours = {theirs: name for name, theirs in POOLINGS.items()}
    if len(modes) != 1 or modes[0] not in ours:
        raise ValueError(f"{folder / 'config.json'}: pooling {', '.join(modes)} is not implemented")
    return ours[modes[0]]


def _read_projection(folder: Path) -> Projection:
    config = read_json(folder / "config.json")
    activation = config.get("activation_function", "Tanh").rpartition(".")[2]
    if activation not in _ACTIVATIONS:
        raise ValueError(f"{folder / 'config.json'}: the activation {activation} is not implemented")
    if {config.get("module_input_name", _ONE_VECTOR), config.get("module_output_name", _ONE_VECTOR)} != {_ONE_VECTOR}:
        raise ValueError(f"{folder / 'config.json'}: a dense layer on each token is not implemented")
    projection = Projection(config["in_features"], config["out_features"], config.get("bias", True), activation)
    file = next((folder / n for n in ("model.safetensors", "pytorch_model.bin") if (folder / n).is_file()), None)
    if file is None:
        raise ValueError(f"{folder} holds no weights")
    projection.load_state_dict(safe_load(file))
    return projection.requires_grad_(False)
