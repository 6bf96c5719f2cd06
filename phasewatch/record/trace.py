"""What is observed at every step, packed into blocks: one line of the record for many steps."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from phasewatch.record.plain import LARGEST_WHOLE, mapping, member, text, texts, whole

LARGEST_GROUP = 2**26
"""Bytes that signals of the same steps take unpacked in one block, at most; 200 signals at 16,384 steps, the most that
are observed, take a fifth of that. Chosen."""


class Observed(NamedTuple):
    """One signal as it was observed while training went on.

    Attributes:
        steps: Ascending, one value a step, shape ``(k,)``, int64.
        values: Shape ``(k,)``, float64 with the precision of float32; what was not finite is as it was.
    """

    steps: NDArray[np.int64]
    values: NDArray[np.float64]


def pack(signals: Mapping[str, tuple[Sequence[int], Sequence[float]]]) -> dict[str, Any]:
    """The body of a line that holds signals observed at many steps.

    Values are kept as float32, exactly. Signals of the same steps stand together: first the steps, then one signal
    after another, each as the differences of neighbours (of the bit patterns where they are floats), byte by byte, so
    that ``zlib`` finds the many bytes that hardly change. (This is the order of the *shuffle* filter of HDF5.)

    Args:
        signals: Name to steps and values, at least one of each. Where a step stands twice, the later one holds.
    """
    together: dict[bytes, tuple[NDArray[np.int64], dict[str, NDArray[np.float64]]]] = {}
    for name, (steps, values) in signals.items():
        found = _settled(np.array(steps, np.int64), np.array(values, np.float64))
        together.setdefault(found.steps.tobytes(), (found.steps, {}))[1][name] = found.values
    return {
        "step": min(int(steps[0]) for steps, _ in together.values()),
        "signals": [
            {"names": list(named), "count": len(steps), "packed": _packed(steps, list(named.values()))}
            for steps, named in together.values()
        ],
    }


def unpack(bodies: Iterable[Mapping[str, Any]]) -> dict[str, Observed]:
    """The signals in blocks, by their names in order of appearance; of two values for one step, the later one.

    Raises:
        ValueError: If one is not as :func:`pack` makes it.
    """
    pieces: dict[str, list[Observed]] = {}
    for body in bodies:
        groups = member(body, "signals")
        if not isinstance(groups, list):
            raise ValueError("signals are no list")
        for group in groups:
            names = texts(member(mapping(group, "signals"), "names"), "names")
            count = whole(member(group, "count"), "count")
            steps, *values = _unpacked(text(member(group, "packed"), "packed"), count, len(names))
            if not len(steps) or steps[0] < 0 or steps[-1] > LARGEST_WHOLE or np.any(np.diff(steps) <= 0):
                raise ValueError("its steps do not ascend")
            for name, own in zip(names, values, strict=True):
                pieces.setdefault(name, []).append(Observed(steps, own))
    return {name: joined(found) for name, found in pieces.items()}


def joined(pieces: Sequence[Observed]) -> Observed:
    """One signal of several pieces in the order in which they were observed; of two values for one step, the later."""
    return _settled(np.concatenate([p.steps for p in pieces]), np.concatenate([p.values for p in pieces]))


def noise_scale(observed: Mapping[str, Observed], window: int = 20, which: str = "") -> Observed:
    """The noise scale of the gradient in batches: with so many a step, its noise were as long as the gradient itself.

    It is tr Σ / |G|² of one batch, the *simple noise scale* of McCandlish et al. 2018 (arXiv:1812.06162) in units of
    the batch that a step is made with; times the samples in that batch, it is theirs. Both parts come from pairs of
    gradients g, g' of successive steps, whose batches differ while the weights hardly do: ½ |g - g'|² has the
    expectation tr Σ and g·g' that of |G|². Each is averaged over neighbouring pairs before they are divided, since the
    quotient of one pair has no mean. What a step changes in the gradient itself counts as noise, which matters where
    there is little: with all of the data in every batch this is not 0.

    Args:
        observed: :attr:`phasewatch.record.Run.observed`.
        window: How many pairs are averaged over.
        which: What is behind the names of the signals of an optimizer other than the first, such as ``"_1"``.

    Returns:
        The noise scale at the last step of each window; NaN where the mean of g·g' is not positive.

    Raises:
        KeyError: If no pair of gradients was observed.
        ValueError: If ``window`` is not positive.
    """
    if window < 1:
        raise ValueError(f"window is {window}; expected over how many pairs of gradients to average, at least 1")
    names = [f"gradient_variance{which}", f"gradient_product{which}"]
    if missing := [name for name in names if name not in observed]:
        raise KeyError(f"no {missing[0]!r} was observed, of which the noise scale is made; there are: {[*observed]}")
    (first, of_first), (second, of_second) = (observed[name] for name in names)
    steps, at, of = np.intersect1d(first, second, assume_unique=True, return_indices=True)
    variance, product = of_first[at], of_second[of]
    known = np.isfinite(variance) & np.isfinite(product)
    if known.sum() < window:
        return Observed(steps[:0], variance[:0])
    noise, signal = (sliding_window_view(part[known], window).mean(axis=1) for part in (variance, product))
    scale = np.divide(noise, signal, out=np.full(len(noise), np.nan), where=signal > 0)
    return Observed(steps[known][window - 1 :], scale)


def _settled(steps: NDArray[np.int64], values: NDArray[np.float64]) -> Observed:
    """In order of the steps, the last value for each."""
    order = np.argsort(steps, kind="stable")
    steps, values = steps[order], values[order]
    last = np.append(steps[1:] != steps[:-1], True)[: len(steps)]
    return Observed(steps[last], values[last])


def _packed(steps: NDArray[np.int64], values: Sequence[NDArray[np.float64]]) -> str:
    with np.errstate(over="ignore"):  # beyond float32 is inf, which says as much
        bits = [own.astype("<f4").view("<u4") for own in values]
    return base64.b64encode(zlib.compress(b"".join(map(_planes, (steps.astype("<u8"), *bits))))).decode()


def _unpacked(packed: str, count: int, signals: int) -> list[Any]:
    sizes = [8 * count, *[4 * count] * signals]
    if sum(sizes) > LARGEST_GROUP:
        raise ValueError(f"it says that it holds {sum(sizes)} bytes; expected {LARGEST_GROUP} at most")
    stream = zlib.decompressobj()
    try:
        data = stream.decompress(base64.b64decode(packed), sum(sizes) + 1)
    except zlib.error as error:
        raise ValueError(f"it cannot be unpacked ({error})") from error
    if len(data) != sum(sizes):
        raise ValueError("it does not hold what it says")
    first, *rest = (data[end - size : end] for end, size in zip(np.cumsum(sizes), sizes, strict=True))
    floats = (_from_planes(own, "<u4").view("<f4").astype(np.float64) for own in rest)
    return [_from_planes(first, "<u8").astype(np.int64), *floats]


def _planes(numbers: NDArray[Any]) -> bytes:
    """Differences of neighbours: all lowest bytes, then all second bytes, and so on. Unsigned, so that they wrap."""
    return np.diff(numbers, prepend=numbers.dtype.type(0)).view(np.uint8).reshape(len(numbers), -1).T.tobytes()


def _from_planes(data: bytes, kind: Literal["<u4", "<u8"]) -> NDArray[Any]:
    planes = np.frombuffer(data, np.uint8).reshape(np.dtype(kind).itemsize, -1)
    return np.cumsum(np.ascontiguousarray(planes.T).view(kind)[:, 0], dtype=kind)
