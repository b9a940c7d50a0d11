"""Settings that make no sense for so few images or steps: a sentence with the flag and a value to take, or None."""

from collections.abc import Sequence

import numpy as np

from shared import distributed


def tell_settings(*sentences: str | None) -> None:
    """Print what there is to say; no flag is changed."""
    for sentence in filter(None, sentences):
        distributed.print_once(f"NOTE: {sentence}")


def long_warmup(flag: str, warmup: float, total: int, unit: str = "epochs") -> str | None:
    """A warm-up of more than a third of the run; a tenth is usual."""
    take = max(round(total / 10), int(total >= 3))
    sentence = f"{flag} {warmup:g} is a warm-up for {warmup / total:.0%} of the {total} {unit}: take {flag} {take}"
    return sentence if warmup > total / 3 else None


def long_freeze(flag: str, frozen: int, total_steps: int) -> str | None:
    """Layers that do not learn for more than a tenth of the run."""
    sentence = f"{flag} {frozen} is more than a tenth of the {total_steps} steps: take {flag} {total_steps // 10}"
    return sentence if frozen > total_steps / 10 else None


def slow_average(flag: str, momenta: np.ndarray, what: str = "teacher") -> str | None:
    """Momenta of all steps with which an average of the weights keeps more than half of those it starts with."""
    kept, steps = float(np.prod(momenta)), len(momenta)
    take = max(0.5, 1 - 9 / steps)  # on a cosine to 1 it keeps a hundredth
    sentence = f"after {steps} steps the {what} still keeps {kept:.0%} of its initial weights: take {flag} {take:.3g}"
    return f"{flag} {momenta[0]:g}: {sentence}" if kept > 0.5 else None


def more_than_data(
    flag: str, numbers: int | Sequence[int], num_images: int, take: int | None = None, what: str = "images"
) -> str | None:
    """More outputs, clusters, rows of a queue or of a batch than images; by default one for ten images is advised."""
    numbers = [numbers] if isinstance(numbers, int) else numbers
    advice = [max(2, num_images // 10) if take is None else take] * len(numbers)
    have, advised = (" ".join(map(str, values)) for values in (numbers, advice))
    sentence = f"{flag} {have} is more than the {num_images} {what}: take {flag} {advised}"
    return sentence if max(numbers) > num_images else None
