"""Stain transfer between two H&E images in closed form.

With two stains the transfer is linear in optical density. Each output channel is a product of one factor per input
channel, and each factor depends on one 8-bit value. Three tables of 256 entries per output channel therefore replace
logarithm, matrix product and exponential exactly.
"""

from __future__ import annotations

import numba
import numpy as np

#: RGB to LMS (Ruderman et al. 1998), and log LMS to the decorrelated l, alpha, beta of Reinhard et al. (2001)
RGB_TO_LMS = np.array([[0.3811, 0.5783, 0.0402], [0.1967, 0.7244, 0.0782], [0.0241, 0.1288, 0.8444]])
LMS_TO_LAB = np.diag(1 / np.sqrt([3.0, 6.0, 2.0])) @ np.array([[1.0, 1.0, 1.0], [1.0, 1.0, -2.0], [1.0, -1.0, 0.0]])

#: optical densities of hematoxylin, eosin and a residual, as rows (Ruifrok and Johnston 2001)
HED = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
#: hematoxylin and eosin vectors of length 1
HEMATOXYLIN, EOSIN = HED[:2] / np.linalg.norm(HED[:2], axis=1, keepdims=True)
#: stain vectors closer than the first angle are one stain, degrees. If both vectors have the color of one stain, the
#: second angle applies. Stain vectors of real sections are 18 to 73 degrees apart.
LEAST_ANGLE, NOISE_ANGLE = 3.0, 12.0
#: smallest ratio of the amounts of the two stains; the smallest in real sections is 0.13
LEAST_SHARE = 0.05


def optical_density(rgb: np.ndarray, white_point: np.ndarray) -> np.ndarray:
    """Compute natural-log optical density, ``-log((rgb + 1) / (white + 1))``.

    - `rgb`: intensities from 0 to 255, ``(..., 3)``.
    - `white_point`: intensities of unstained glass, ``(3,)``.
    - returns: ``float64 (..., 3)``.

    >>> optical_density(np.array([255, 255, 255]), np.array([255, 255, 255])) == 0
    array([ True,  True,  True])
    """
    return -np.log((np.asarray(rgb, dtype=np.float64) + 1) / (np.asarray(white_point, dtype=np.float64) + 1))


def angle_between(first: np.ndarray, second: np.ndarray) -> float:
    """Return the angle between two vectors, in degrees.

    >>> round(angle_between(HEMATOXYLIN, EOSIN), 1)
    39.4
    """
    cosine = first @ second / (np.linalg.norm(first) * np.linalg.norm(second))
    return float(np.degrees(np.arccos(np.clip(cosine, -1.0, 1.0))))


def why_inseparable(matrix: np.ndarray, amounts: np.ndarray) -> str | None:
    """Return why two fitted stains are not hematoxylin and eosin, or `None` if they are.

    - `matrix`: stain matrix ``(3, 3)``, with columns hematoxylin, eosin and residual.
    - `amounts`: high percentiles of the concentrations of hematoxylin and eosin, ``(2,)``.
    - returns: the reason: the vectors coincide, or one stain is almost absent.

    >>> why_inseparable(np.stack([HEMATOXYLIN, EOSIN, np.cross(HEMATOXYLIN, EOSIN)], axis=1), np.array([1.0, 0.5]))
    >>> why_inseparable(np.stack([EOSIN + [0.0, 0.0, 0.01], EOSIN, HEMATOXYLIN], axis=1), np.array([1.0, 0.5]))
    'the vectors of hematoxylin and eosin are 0.6 degrees apart'
    """
    angle = angle_between(matrix[:, 0], matrix[:, 1])
    both_eosin = angle_between(matrix[:, 0], EOSIN) < angle_between(matrix[:, 0], HEMATOXYLIN) / 2
    both_hematoxylin = angle_between(matrix[:, 1], HEMATOXYLIN) < angle_between(matrix[:, 1], EOSIN) / 2
    if not angle >= (NOISE_ANGLE if both_eosin or both_hematoxylin else LEAST_ANGLE):
        return f"the vectors of hematoxylin and eosin are {angle:.1f} degrees apart"
    share = float(min(amounts) / max(*amounts, 1e-12))
    if not share >= LEAST_SHARE:
        return f"one of them has {max(share, 0.0):.1%} of the amount of the other"
    return None


def transfer_matrix(source: np.ndarray, target: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Return the linear map of optical densities from one staining to another.

    - `source`, `target`: stain matrices ``(3, 3)``, with unit-length columns hematoxylin, eosin and residual.
    - `scale`: factors of the hematoxylin and eosin concentrations, ``(2,)``. The residual is unchanged.
    - returns: ``float64 (3, 3)``: ``target @ diag(scale, 1) @ inverse(source)``.
    """
    return target @ np.diag([scale[0], scale[1], 1.0]) @ np.linalg.inv(source)


def transfer_tables(matrix: np.ndarray, source_white: np.ndarray, target_white: np.ndarray) -> np.ndarray:
    """Compute the lookup tables of a stain transfer.

    - `matrix`: linear map of optical densities, ``(3, 3)``.
    - `source_white`, `target_white`: white points of the two images, ``(3,)``.
    - returns: factor per output channel, input channel and input value, ``float32 (3, 3, 256)``. The product over input
      channels, minus 1, is the output intensity.
    """
    density = optical_density(np.repeat(np.arange(256)[:, None], 3, axis=1), source_white)  # (256, 3)
    tables = np.exp(-matrix[:, :, None] * density.T[None])
    tables[:, 0] *= (np.asarray(target_white, dtype=np.float64) + 1)[:, None]
    return tables.astype(np.float32)


def apply_tables(image: np.ndarray, tables: np.ndarray) -> np.ndarray:
    """Apply the lookup tables of a stain transfer to an image.

    - `image`: ``uint8 (3, y, x)``.
    - `tables`: tables from `transfer_tables`, ``float32 (3, 3, 256)``.
    - returns: ``uint8 (3, y, x)``, clipped and rounded.
    """
    image = np.ascontiguousarray(image)
    out = np.empty_like(image)
    _apply_tables(image.reshape(3, -1), tables, out.reshape(3, -1))
    return out


@numba.njit(nogil=True, cache=True, fastmath=True)
def _apply_tables(image: np.ndarray, tables: np.ndarray, out: np.ndarray) -> None:
    for channel in range(3):
        red, green, blue = tables[channel, 0], tables[channel, 1], tables[channel, 2]
        for pixel in range(image.shape[1]):
            value = red[image[0, pixel]] * green[image[1, pixel]] * blue[image[2, pixel]] - np.float32(0.5)
            out[channel, pixel] = np.uint8(min(max(value, np.float32(0.0)), np.float32(255.0)))


def reinhard_transfer(
    image: np.ndarray,
    *,
    source_mean: np.ndarray,
    source_deviation: np.ndarray,
    target_mean: np.ndarray,
    target_deviation: np.ndarray,
) -> np.ndarray:
    """Match mean and deviation of l, alpha and beta to a target (Reinhard et al. 2001).

    - `image`: ``uint8 (3, y, x)``.
    - `source_mean`, `source_deviation`, `target_mean`, `target_deviation`: statistics of l, alpha and beta over tissue,
      ``(3,)``.
    - returns: ``uint8 (3, y, x)``, clipped and rounded.
    """
    gain = np.asarray(target_deviation) / np.maximum(source_deviation, 1e-6)
    # the chain log LMS -> lab -> matched lab -> log LMS is one affine map
    linear = np.linalg.inv(LMS_TO_LAB) @ np.diag(gain) @ LMS_TO_LAB
    offset = np.linalg.inv(LMS_TO_LAB) @ (np.asarray(target_mean) - gain * np.asarray(source_mean))
    image = np.ascontiguousarray(image)
    out = np.empty_like(image)
    to_lms, to_rgb = RGB_TO_LMS.astype(np.float32), np.linalg.inv(RGB_TO_LMS).astype(np.float32)
    affine = linear.astype(np.float32), offset.astype(np.float32)
    _reinhard(image.reshape(3, -1), to_lms, affine[0], affine[1], to_rgb, out.reshape(3, -1))
    return out


@numba.njit(nogil=True, cache=True, fastmath=True)
def _reinhard(
    image: np.ndarray, to_lms: np.ndarray, linear: np.ndarray, offset: np.ndarray, to_rgb: np.ndarray, out: np.ndarray
) -> None:
    one = np.float32(1.0)
    for pixel in range(image.shape[1]):
        red, green, blue = np.float32(image[0, pixel]), np.float32(image[1, pixel]), np.float32(image[2, pixel])
        log_0 = np.log(to_lms[0, 0] * red + to_lms[0, 1] * green + to_lms[0, 2] * blue + one)
        log_1 = np.log(to_lms[1, 0] * red + to_lms[1, 1] * green + to_lms[1, 2] * blue + one)
        log_2 = np.log(to_lms[2, 0] * red + to_lms[2, 1] * green + to_lms[2, 2] * blue + one)
        long_ = np.exp(linear[0, 0] * log_0 + linear[0, 1] * log_1 + linear[0, 2] * log_2 + offset[0]) - one
        medium = np.exp(linear[1, 0] * log_0 + linear[1, 1] * log_1 + linear[1, 2] * log_2 + offset[1]) - one
        short = np.exp(linear[2, 0] * log_0 + linear[2, 1] * log_1 + linear[2, 2] * log_2 + offset[2]) - one
        for channel in range(3):
            value = to_rgb[channel, 0] * long_ + to_rgb[channel, 1] * medium + to_rgb[channel, 2] * short
            out[channel, pixel] = np.uint8(min(max(value + np.float32(0.5), np.float32(0.0)), np.float32(255.0)))


def tissue_lab(rgb: np.ndarray) -> np.ndarray:
    """Compute the decorrelated l, alpha and beta of pixels (Reinhard et al. 2001).

    - `rgb`: intensities from 0 to 255, ``(n, 3)``.
    - returns: the three channels, ``float64 (n, 3)``.
    """
    return np.log(np.asarray(rgb, dtype=np.float64) @ RGB_TO_LMS.T + 1) @ LMS_TO_LAB.T
