"""Pictures with the spectrum of photographs, so that resizing and blur meet realistic detail."""

import io

import numpy as np
from PIL import Image


def photograph(seed: int, height: int = 150, width: int = 200) -> np.ndarray:
    """RGB, uint8, (height, width, 3): amplitudes fall as 1 / frequency, colours are correlated."""
    rng = np.random.default_rng(seed)
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    amplitude = 1 / np.maximum(np.hypot(rows, columns), 1 / width)
    phases = rng.uniform(0, 2 * np.pi, (3, *amplitude.shape))
    planes = np.fft.irfft2(amplitude * np.exp(1j * phases), s=(height, width))
    planes = planes + 1.5 * planes.mean(axis=0)
    pixels = rng.uniform(90, 160) + 50 * (planes - planes.mean()) / planes.std()
    return pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)


def encoded(image: Image.Image | np.ndarray, file_format: str, **options) -> bytes:
    """Content of an image file."""
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()
