"""Stain transfer between two H&E images in closed form: numbers in, numbers out.

With two stains the transfer is linear in optical density, so that an output channel is a product of one
factor an input channel. Each factor depends on one 8-bit value alone: three tables of 256 entries a
channel replace logarithm, matrix product and exponential, exactly.
"""

from __future__ import annotations

import numba
import numpy as np

#: Ruderman et al. (1998): RGB to LMS, and log LMS to the decorrelated l, alpha, beta of Reinhard et al. (2001)
RGB_TO_LMS = np.array([[0.3811, 0.5783, 0.0402], [0.1967, 0.7244, 0.0782], [0.0241, 0.1288, 0.8444]])
LMS_TO_LAB = np.diag(1 / np.sqrt([3.0, 6.0, 2.0])) @ np.array([[1.0, 1.0, 1.0], [1.0, 1.0, -2.0], [1.0, -1.0, 0.0]])


def optical_density(rgb: np.ndarray, white_point: np.ndarray) -> np.ndarray:
    """Natural-log optical density against a white point, ``-log((rgb + 1) / (white + 1))``.

    Parameters
    ----------
    rgb
        ``(..., 3)`` intensities, 0 to 255.
    white_point
        ``(3,)`` intensities of unstained glass.

    Returns
    -------
    ``float64 (..., 3)``.

    Examples
    --------
    >>> optical_density(np.array([255, 255, 255]), np.array([255, 255, 255])) == 0
    array([ True,  True,  True])
    """
    return -np.log((np.asarray(rgb, dtype=np.float64) + 1) / (np.asarray(white_point, dtype=np.float64) + 1))


def transfer_matrix(source: np.ndarray, target: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The linear map of optical densities that carries one staining onto another.

    Parameters
    ----------
    source, target
        ``(3, 3)`` stain matrices; columns are haematoxylin, eosin and the residual, unit length.
    scale
        ``(2,)`` factors of the haematoxylin and eosin concentrations; the residual is kept as it is.

    Returns
    -------
    ``float64 (3, 3)``: ``target @ diag(scale, 1) @ inverse(source)``.
    """
    return target @ np.diag([scale[0], scale[1], 1.0]) @ np.linalg.inv(source)


def transfer_tables(matrix: np.ndarray, source_white: np.ndarray, target_white: np.ndarray) -> np.ndarray:
    """Tabulate a stain transfer.

    Parameters
    ----------
    matrix
        ``(3, 3)`` map of optical densities.
    source_white, target_white
        ``(3,)`` white points of the two images.

    Returns
    -------
    ``float32 (3, 3, 256)``: factor of output channel, input channel and input value; the product over
    input channels, less 1, is the output intensity.
    """
    density = optical_density(np.repeat(np.arange(256)[:, None], 3, axis=1), source_white)  # (256, 3)
    tables = np.exp(-matrix[:, :, None] * density.T[None])
    tables[:, 0] *= (np.asarray(target_white, dtype=np.float64) + 1)[:, None]
    return tables.astype(np.float32)


def apply_tables(image: np.ndarray, tables: np.ndarray) -> np.ndarray:
    """Carry out a tabulated stain transfer.

    Parameters
    ----------
    image
        ``uint8 (3, y, x)``.
    tables
        ``float32 (3, 3, 256)`` from `transfer_tables`.

    Returns
    -------
    ``uint8 (3, y, x)``, clipped and rounded.
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
    """Match mean and deviation of an image's l, alpha, beta channels to a target's (Reinhard et al. 2001).

    Parameters
    ----------
    image
        ``uint8 (3, y, x)``.
    source_mean, source_deviation, target_mean, target_deviation
        ``(3,)`` statistics of l, alpha and beta over tissue.

    Returns
    -------
    ``uint8 (3, y, x)``, clipped and rounded.
    """
    gain = np.asarray(target_deviation) / np.maximum(source_deviation, 1e-6)
    # log LMS -> lab -> matched lab -> log LMS is one affine map
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
    """The decorrelated l, alpha, beta of pixels, as used by Reinhard et al. (2001).

    Parameters
    ----------
    rgb
        ``(n, 3)`` intensities, 0 to 255.

    Returns
    -------
    ``float64 (n, 3)``.
    """
    return np.log(np.asarray(rgb, dtype=np.float64) @ RGB_TO_LMS.T + 1) @ LMS_TO_LAB.T
