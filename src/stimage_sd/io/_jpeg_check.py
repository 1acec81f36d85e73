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
#: bits of a window of codes that are followed at once; more bits take larger tables than the fastest cache holds
RUN = 12
#: number of different headers to keep
MOST_KNOWN = 16
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
    known = _known.get(tables)
    if known is None or bytes(data[: len(known.header)]) != known.header:
        # The tiles of a page have the same markers, so these are read only once.
        known = _Plan.of(data, tables)
        if len(known.header) < len(data):  # otherwise the last marker may be cut
            if len(_known) >= MOST_KNOWN:
                _known.clear()
            _known[tables] = known
    if known.scan is None:
        return
    result = _follow(np.frombuffer(data, np.uint8), len(known.header), *known.scan)
    if result != WHOLE:
        raise ValueError(f"the JPEG data {REASONS[result]}")


@dataclass(frozen=True)
class _Plan:
    """What to check in a scan, from the markers before it.

    - `header`: bytes before the scan. Images with the same header have the same plan.
    - `scan`: arguments of `_follow`. `None` if only the markers are checked.
    """

    header: bytes
    scan: tuple[int, int, np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None

    @classmethod
    def of(cls, data: bytes | memoryview, tables: bytes | None) -> _Plan:
        """Read the markers of an image, and check them."""
        markers = _Markers()
        try:
            if tables:
                _read_markers(memoryview(tables), markers)
            _read_markers(memoryview(data), markers)
        except (struct.error, IndexError) as error:
            raise ValueError("the JPEG data has a marker that ends too early") from error
        if not markers.start:
            raise ValueError("the JPEG data has no image")
        header = bytes(data[: markers.start])
        components = markers.components
        whole = len(markers.selectors) == len(components) and 0 not in (markers.height, markers.width)
        if markers.frame not in SEQUENTIAL or not whole:
            return cls(header, None)
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
        codes = _stacked(tuple(markers.codes[name] for name in names))
        # a value of so many bits passes with any step
        most = max(bits for bits in range(16) if ((1 << bits) - 2) * int(steps.max()) <= LARGEST)
        return cls(header, (units, markers.interval, np.array(order), codes, _runs(codes, most), steps))


#: plan of the last image, by the tables outside its data
_known: dict[bytes | None, _Plan] = {}


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
    """Return the first code of every 16 bits, per table: 256 times its bits and those of its value, plus its symbol.

    0 stands for no code.
    """
    lookup = np.zeros((len(tables), 1 << 16), dtype=np.uint16)
    for index, table in enumerate(tables):
        code, place = 0, 16
        for length, count in enumerate(table[:16], start=1):
            for _ in range(count):
                first = code << (16 - length)
                symbol = table[place]
                lookup[index, first : first + (1 << (16 - length))] = ((length + (symbol & 15)) << 8) | symbol
                code, place = code + 1, place + 1
            code <<= 1
    return lookup


# Signed numbers throughout: numba makes floats of a signed and an unsigned one.


@numba.njit(nogil=True, cache=True)
def _runs(codes: np.ndarray, most: int) -> np.ndarray:  # pragma: no cover
    """Return the run of codes that every `RUN` bits hold in full, per table.

    A run has coefficients with values of at most `most` bits, and may end its block. An entry has the bits of the run,
    16 times its coefficients, and 2¹⁵ if it ends the block. 0 stands for no run.
    """
    runs = np.zeros((codes.shape[0], 1 << RUN), dtype=np.uint16)
    for table in range(codes.shape[0]):
        for window in range(1 << RUN):
            bits, coefficients, ends = 0, 0, 0
            while ends == 0:
                entry = int(np.int64(codes[table, (window << (16 - RUN + bits)) & 0xFFFF]))
                zeros, category = (entry >> 4) & 15, entry & 15
                if entry == 0 or bits + (entry >> 8) > RUN or category > most or (category == 0 and zeros > 0):
                    break
                bits += entry >> 8
                if category == 0:
                    ends = 1
                else:
                    coefficients += zeros + 1
            if coefficients < 64:
                runs[table, window] = bits | (coefficients << 4) | (ends << 15)
    return runs


@numba.njit(nogil=True, cache=True)
def _follow(
    data: np.ndarray,
    start: int,
    units: int,
    interval: int,
    order: np.ndarray,
    codes: np.ndarray,
    runs: np.ndarray,
    steps: np.ndarray,
) -> int:  # pragma: no cover
    """Follow the codes of a scan. `order` has the component and the two tables for each block of a unit."""
    size = data.shape[0]
    words = np.empty(size - start + 8, dtype=np.uint64)
    means = np.zeros(steps.shape[0], dtype=np.int64)
    place, end = _unstuff(data, start, words)
    bit = 0
    for unit in range(units):
        if interval > 0 and unit > 0 and unit % interval == 0:
            place = _after_fill(data, place)
            if end - bit >= 8 or place + 1 >= size or not 0xD0 <= data[place + 1] <= 0xD7:
                return BAD_CODE
            place, end = _unstuff(data, place + 2, words)
            bit = 0
            means[:] = 0
        for block in range(order.shape[0]):
            owner = order[block, 0]
            bit, result = _follow_mean(words, bit, end, owner, codes[order[block, 1]], steps, means)
            if result == WHOLE:
                table = order[block, 2]
                bit, result = _follow_block(words, bit, end, codes[table], runs[table], steps[owner])
            if result != WHOLE:
                return result
    # A complete scan leaves fewer than eight bits, then a marker. Some encoders omit the last marker.
    place = _after_fill(data, place)
    ends = place >= size or (place + 1 < size and data[place] == 0xFF and data[place + 1] != 0)
    return WHOLE if end - bit < 8 and ends else TOO_LONG


@numba.njit(nogil=True, cache=True)
def _unstuff(data: np.ndarray, place: int, words: np.ndarray) -> tuple[int, int]:  # pragma: no cover
    """Write the eight bytes that end at every byte to `words`, up to the next marker, then zeros.

    Returns the place of the marker and the number of bits before it.
    """
    size, n_bytes, held = data.shape[0], 0, np.uint64(0)
    while place < size:
        byte = data[place]
        if byte == 0xFF:
            # a zero byte follows a byte that is no marker
            if place + 1 >= size or data[place + 1] != 0:
                break
            place += 1
        place += 1
        held = (held << np.uint64(8)) | np.uint64(byte)
        words[n_bytes] = held
        n_bytes += 1
    for extra in range(8):
        held <<= np.uint64(8)
        words[n_bytes + extra] = held
    return place, 8 * n_bytes


@numba.njit(nogil=True, cache=True)
def _after_fill(data: np.ndarray, place: int) -> int:  # pragma: no cover
    """Return the place after fill bytes, which may precede a marker."""
    while place + 1 < data.shape[0] and data[place] == 0xFF and data[place + 1] == 0xFF:
        place += 1
    return place


@numba.njit(nogil=True, cache=True)
def _window(words: np.ndarray, bit: int) -> np.uint64:  # pragma: no cover
    """Return the next 64 bits, of which at least 57 are read. A code and its value have at most 31."""
    return words[(bit >> 3) + 7] << np.uint64(bit & 7)


@numba.njit(nogil=True, cache=True)
def _value(window: np.uint64, entry: int) -> int:  # pragma: no cover
    """Return the value behind a code."""
    category = entry & 15
    value = int(np.int64((window << np.uint64((entry >> 8) - category)) >> np.uint64(64 - category)))
    return value if value >= 1 << (category - 1) else value - (1 << category) + 1


@numba.njit(nogil=True, cache=True)
def _follow_mean(
    words: np.ndarray, bit: int, end: int, owner: int, codes: np.ndarray, steps: np.ndarray, means: np.ndarray
) -> tuple[int, int]:  # pragma: no cover
    """Follow the code of the mean of a block."""
    window = _window(words, bit)
    entry = int(np.int64(codes[window >> np.uint64(48)]))
    if entry == 0:
        return bit, BAD_CODE if end - bit >= 16 else TOO_SHORT
    bit += entry >> 8
    if bit > end:
        return bit, TOO_SHORT
    if entry & 15:
        means[owner] += _value(window, entry)
    return bit, BAD_CODE if (abs(means[owner]) - 1) * steps[owner, 0] > LARGEST else WHOLE


@numba.njit(nogil=True, cache=True)
def _follow_block(
    words: np.ndarray, bit: int, end: int, codes: np.ndarray, runs: np.ndarray, steps: np.ndarray
) -> tuple[int, int]:  # pragma: no cover
    """Follow the codes of a block after its mean, as many at once as `runs` has."""
    coefficient = 1
    while coefficient < 64:
        window = _window(words, bit)
        run = int(np.int64(runs[window >> np.uint64(64 - RUN)]))
        after, ahead = coefficient + ((run >> 4) & 127), bit + (run & 15)
        # a block whose last coefficient is there has no code for its end
        if run != 0 and after + (run >> 15) <= 64 and ahead <= end:
            coefficient, bit = after, ahead
            if run >> 15:
                return bit, WHOLE
            continue
        entry = int(np.int64(codes[window >> np.uint64(48)]))
        if entry == 0:
            return bit, BAD_CODE if end - bit >= 16 else TOO_SHORT
        bit += entry >> 8
        if bit > end:
            return bit, TOO_SHORT
        zeros, category = (entry >> 4) & 15, entry & 15
        if category == 0:
            if zeros == 0:
                return bit, WHOLE
            if zeros != 15:
                return bit, BAD_CODE
            coefficient += 16
            continue
        coefficient += zeros
        if coefficient > 63 or (abs(_value(window, entry)) - 1) * steps[coefficient] > LARGEST:
            return bit, BAD_CODE
        coefficient += 1
    return bit, WHOLE
