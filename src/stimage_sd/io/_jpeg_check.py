"""Check that the data of a JPEG image are complete and undamaged.

JPEG has no checksum, and decoders continue after damage. A scan is one sequence of variable-length codes, and a wrong
bit shifts all following codes. A damaged scan therefore has codes that are in no table, impossible coefficients, or
an end that is not the end of its last block. Following the codes finds all three without decoding pixels.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from functools import lru_cache

import numba
import numpy as np

#: frames of Huffman codes, block after block: baseline and extended sequential
SEQUENTIAL = (0xC0, 0xC1)
#: markers of frames of any kind
FRAMES = (*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0))
HUFFMAN, END, SCAN, QUANTIZATION, RESTART_INTERVAL = 0xC4, 0xD9, 0xDA, 0xDB, 0xDD
#: largest coefficient of 8-bit pixels: eight times the distance from gray, plus a margin for rounding of colors
LARGEST = 1200
#: return values of `_follow`
WHOLE, BAD_CODE, TOO_SHORT, TOO_LONG = range(4)
REASONS = {BAD_CODE: "has codes that no image has", TOO_SHORT: "ends too early", TOO_LONG: "ends too late"}


@dataclass
class _Markers:
    """Content of the markers before a scan."""

    codes: dict[int, bytes] = field(default_factory=dict)
    steps: dict[int, np.ndarray] = field(default_factory=dict)
    frame: int = 0
    height: int = 0
    width: int = 0
    #: per component: horizontal and vertical sampling, number of the quantization table
    components: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    #: components of the scan, with the numbers of their two Huffman tables, four bits per number
    selectors: list[tuple[int, int]] = field(default_factory=list)
    start: int = 0
    interval: int = 0


def check_jpeg(data: bytes | memoryview, tables: bytes | None = None) -> None:
    """Check the compressed data of a JPEG image, or only its first markers if progressive or lossless.

    - `data`: image data, from the first marker to the last.
    - `tables`: tables that are stored outside `data`, as for a TIFF page.
    """
    markers = _Markers()
    try:
        if tables:
            _read_markers(memoryview(tables), markers)
        _read_markers(memoryview(data), markers)
    except (struct.error, IndexError) as error:
        raise ValueError("the JPEG data has a marker that ends too early") from error
    if not markers.start:
        raise ValueError("the JPEG data has no image")
    components = markers.components
    whole = len(markers.selectors) == len(components) and 0 not in (markers.height, markers.width)
    if markers.frame not in SEQUENTIAL or not whole:
        return
    single = len(components) == 1
    across, down = (1, 1) if single else (max(sides[axis] for sides in components.values()) for axis in (0, 1))
    names, order = sorted(markers.codes), []
    try:
        for index, (component, chosen) in enumerate(markers.selectors):
            horizontal, vertical, _ = components[component]
            one = (index, names.index(chosen >> 4), names.index(0x10 | (chosen & 15)))
            order += [one] * (1 if single else horizontal * vertical)
        steps = np.stack([markers.steps[components[component][2]] for component, _ in markers.selectors])
    except (KeyError, ValueError) as error:
        raise ValueError("the JPEG data lacks a table or a component") from error
    units = -(-markers.width // (8 * across)) * -(-markers.height // (8 * down))
    codes = tuple(markers.codes[name] for name in names)
    result = _follow(
        np.frombuffer(data, np.uint8), markers.start, units, markers.interval, np.array(order), _stacked(codes), steps
    )
    if result != WHOLE:
        raise ValueError(f"the JPEG data {REASONS[result]}")


def _read_markers(view: memoryview, markers: _Markers) -> None:
    """Read the markers before the first scan, and the start of the scan."""
    if bytes(view[:2]) != b"\xff\xd8":
        raise ValueError("the JPEG data does not begin with the JPEG start marker")
    place = 2
    while place + 4 <= len(view):
        if view[place] != 0xFF:
            raise ValueError("the JPEG data has something else where a marker belongs")
        marker = view[place + 1]
        if marker == 0xFF:
            place += 1
            continue
        if marker == END:
            return
        body = bytes(view[place + 4 : place + 2 + struct.unpack_from(">H", view, place + 2)[0]])
        place += 4 + len(body)
        if marker == HUFFMAN:
            _read_tables(body, markers)
        elif marker == QUANTIZATION:
            _read_steps(body, markers)
        elif marker == RESTART_INTERVAL:
            markers.interval = struct.unpack(">H", body)[0]
        elif marker in FRAMES:
            # codes of 12-bit samples are longer and are not checked
            markers.frame = marker if body[0] == 8 else 0
            markers.height, markers.width = struct.unpack_from(">HH", body, 1)
            places = range(6, 6 + 3 * body[5], 3)
            markers.components = {body[at]: (body[at + 1] >> 4, body[at + 1] & 15, body[at + 2]) for at in places}
            if any(0 in sides[:2] for sides in markers.components.values()):
                raise ValueError("the JPEG data has a component without a size")
        elif marker == SCAN:
            markers.selectors = [(body[at], body[at + 1]) for at in range(1, 1 + 2 * body[0], 2)]
            markers.start = place
            return


def _read_tables(body: bytes, markers: _Markers) -> None:
    place = 0
    while place < len(body):
        end = place + 17 + sum(body[place + 1 : place + 17])
        markers.codes[body[place]] = body[place + 1 : end]
        place = end


def _read_steps(body: bytes, markers: _Markers) -> None:
    place = 0
    while place < len(body):
        kind, end = (">u2", place + 129) if body[place] >> 4 else ("u1", place + 65)
        markers.steps[body[place] & 15] = np.frombuffer(body[place + 1 : end], kind, 64).astype(np.int32)
        place = end


@lru_cache(maxsize=16)
def _stacked(tables: tuple[bytes, ...]) -> np.ndarray:
    """Return the first code of every 16 bits, per table: 256 times its length plus its value; 0 for no code."""
    lookup = np.zeros((len(tables), 1 << 16), dtype=np.uint16)
    for index, table in enumerate(tables):
        code, place = 0, 16
        for length, count in enumerate(table[:16], start=1):
            for _ in range(count):
                first = code << (16 - length)
                lookup[index, first : first + (1 << (16 - length))] = (length << 8) | table[place]
                code, place = code + 1, place + 1
            code <<= 1
    return lookup


@numba.njit(nogil=True, cache=True)
def _follow(
    data: np.ndarray,
    start: int,
    units: int,
    interval: int,
    order: np.ndarray,
    codes: np.ndarray,
    steps: np.ndarray,
) -> int:  # pragma: no cover
    """Follow the codes of a scan. `order` has the component and the two tables for each block of a unit."""
    place, bits, held = start, np.uint64(0), 0
    size = data.shape[0]
    means = np.zeros(steps.shape[0], dtype=np.int64)
    for unit in range(units):
        if interval > 0 and unit > 0 and unit % interval == 0:
            while place + 1 < size and data[place] == 0xFF and data[place + 1] == 0xFF:
                place += 1  # fill bytes may precede a marker
            if held >= 8 or place + 1 >= size or data[place] != 0xFF or not 0xD0 <= data[place + 1] <= 0xD7:
                return BAD_CODE
            place, bits, held = place + 2, np.uint64(0), 0
            means[:] = 0
        for block in range(order.shape[0]):
            owner, coefficient = order[block, 0], 0
            table = order[block, 1]
            while coefficient < 64:
                # a code has at most 16 bits, a value at most 15
                while held < 32 and place < size:
                    byte = data[place]
                    if byte == 0xFF:
                        if place + 1 >= size or data[place + 1] != 0:
                            break
                        place += 1
                    place += 1
                    bits = (bits << np.uint64(8)) | np.uint64(byte)
                    held += 8
                if held >= 16:
                    window = (bits >> np.uint64(held - 16)) & np.uint64(0xFFFF)
                else:
                    window = (bits << np.uint64(16 - held)) & np.uint64(0xFFFF)
                entry = int(codes[table, window])
                if entry == 0:
                    return BAD_CODE if held >= 16 else TOO_SHORT
                run = 0 if coefficient == 0 else (entry >> 4) & 15
                category = entry & 15
                length = (entry >> 8) + category
                if length > held:
                    return TOO_SHORT
                held -= length
                value = int((bits >> np.uint64(held)) & ((np.uint64(1) << np.uint64(category)) - np.uint64(1)))
                if category > 0 and value < 1 << (category - 1):
                    value -= (1 << category) - 1
                if coefficient == 0:
                    table = order[block, 2]
                    means[owner] += value
                    value = int(means[owner])
                elif category == 0:
                    if run not in (0, 15):
                        return BAD_CODE
                    coefficient = 64 if run == 0 else coefficient + 16
                    continue
                coefficient += run
                if coefficient > 63 or (abs(value) - 1) * steps[owner, coefficient] > LARGEST:
                    return BAD_CODE
                coefficient += 1
    # A complete scan leaves fewer than eight bits, then a marker. Some encoders omit the last marker.
    while place + 1 < size and data[place] == 0xFF and data[place + 1] == 0xFF:
        place += 1
    ends = place >= size or (place + 1 < size and data[place] == 0xFF and data[place + 1] != 0)
    return WHOLE if held < 8 and ends else TOO_LONG
