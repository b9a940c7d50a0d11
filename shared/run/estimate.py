"""How large the folder of a run becomes, and how people say that and how long it takes."""

from argparse import Namespace

from .checkpoint import tensors_in


def final_bytes(parts: dict, args: Namespace, steps_per_epoch: int, total_steps: int) -> int:
    """Bytes of all checkpoints of a finished run: the newest, the one before it, the best and the numbered ones.

    Every process must call this, after a step: optimisers have no state before.
    """
    one = sum(tensor.nbytes for _, tensor in tensors_in({name: part.state_dict() for name, part in parts.items()}))
    flags, epochs = vars(args), -(-total_steps // steps_per_epoch)
    lengths = {"checkpoint_freq": epochs, "save_freq": total_steps, "checkpoints": total_steps}
    lengths["saveckp_freq"] = epochs + flags.get("saveckp_freq", 0) - 1  # counts from the first epoch on
    return one * (2 + ("best" in parts) + sum(n // flags[name] for name, n in lengths.items() if flags.get(name)))


def duration_text(seconds: float) -> str:
    for unit, length, most in (("s", 1, 100), ("min", 60, 100), ("h", 3600, 48)):
        if seconds < most * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds / 86400:.0f} days"


def size_text(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"
