"""Classifiers: those of timm and torchvision by name, and weights with or without a fitting last layer."""

import difflib
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from shared import distributed

from .weights import CLASSIFIERS, WeightMismatch


def build_library_classifier(
    name: str, num_classes: int, in_chans: int = 3, own_names: Sequence[str] = (), flag: str = "--model", **options
) -> nn.Module:
    """A randomly initialised network of timm, or else of torchvision, that maps images (B, C, H, W) to logits.

    Args:
        own_names: Names that the caller knows besides, for the message.
        flag: Where the name was given, for messages.
        options: Arguments of timm's networks: ``img_size``, which is left out where there is none; rates of dropout
            and stochastic depth, left out with a message; sizes, which are errors where there are none. Networks of
            torchvision take none.

    Raises:
        ValueError: If the name is unknown, or the network has no such sizes or channels.
    """
    import timm
    import torchvision

    options = {option: value for option, value in options.items() if value is not None}
    sizes = {size: value for size, value in options.items() if size in ("patch_size", "embed_dim", "depth")}
    given = " ".join(f"--{size.replace('_', '-')} {value}" for size, value in sizes.items())
    of_its_name = f"{given}: the sizes of {flag} {name} are part of its name"
    if timm.is_model(name):
        options |= {"num_classes": num_classes, "in_chans": in_chans}
        for unknown in ("img_size", "drop_path_rate"):  # convolutional networks have none of the sizes
            try:
                return timm.create_model(name, **options)
            except TypeError as error:
                if sizes:
                    raise ValueError(of_its_name) from error
                tell_unused_rates(f"{flag} {name}", {unknown: options.pop(unknown, None)})
        return timm.create_model(name, **options)
    if name in torchvision.models.list_models(module=torchvision.models):
        if sizes:
            raise ValueError(of_its_name)
        if in_chans != 3:
            raise ValueError(f"--in_chans {in_chans}: torchvision's {flag} {name} takes 3 channels")
        tell_unused_rates(f"{flag} {name}", options)
        auxiliary = {"aux_logits": False} if name in ("googlenet", "inception_v3") else {}
        return torchvision.models.get_model(name, weights=None, num_classes=num_classes, **auxiliary)
    close = difflib.get_close_matches(name, [*own_names, *timm.list_models()], n=3)
    raise ValueError(
        f"{flag} {name} is unknown{'; did you mean ' + ', '.join(close) + '?' if close else '.'} "
        f"Known are {', '.join([*own_names, 'the models of timm and torchvision'])}."
    )


def tell_unused_rates(network: str, options: Mapping[str, float | None]) -> None:
    """Print which rates of dropout and stochastic depth above 0 the network does not take."""
    for option, rate_flag in (("drop_rate", "--drop"), ("drop_path_rate", "--drop-path")):
        if options.get(option):
            distributed.print_once(f"{rate_flag} {options[option]} has no effect on {network}")


def num_classes_of(tensors: Mapping[str, Tensor]) -> int:
    """Outputs of the last layer, ``head``, of a state dict; 0 for a backbone."""
    return len(tensors["head.weight"]) if "head.weight" in tensors else 0


def fill_classifier(network: nn.Module, tensors: Mapping[str, Tensor], origin: str) -> bool:
    """Load a state dict completely; a last layer for other classes is left out, with a message.

    Args:
        origin: Where the tensors come from, for messages.

    Returns:
        Whether the last layer was filled too; a network without one needs none.

    Raises:
        WeightMismatch: If anything else is missing, unknown, of another shape or not finite.
    """
    target = network.state_dict()
    if (bad := next((name for name, value in tensors.items() if not value.isfinite().all()), None)) is not None:
        raise WeightMismatch(f"{origin}: {bad} holds values that are not finite")
    last = [name for name in target if name.split(".")[0] in CLASSIFIERS]
    fits = all(name in tensors and tensors[name].shape == target[name].shape for name in last)
    if not fits or not last:
        tensors = {name: value for name, value in tensors.items() if name.split(".")[0] not in CLASSIFIERS}
    if not fits:
        tensors |= {name: target[name] for name in last}
        distributed.print_once(f"{origin}: its classifier is for other classes, or it has none; ours stays random")
    load_completely(network, tensors, origin)
    distributed.print_once(f"{origin}: {len(target) - len(last) * (not fits)}/{len(target)} entries loaded")
    return fits


def load_completely(
    network: nn.Module, tensors: Mapping[str, Tensor], origin: str, target: str = "the network"
) -> None:
    """``load_state_dict``, with an error of one line.

    Raises:
        WeightMismatch: If the tensors are not those of the network.
    """
    try:
        network.load_state_dict(dict(tensors))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:1000]
        raise WeightMismatch(f"{origin} does not fill {target}: {reason}") from error
