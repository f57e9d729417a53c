"""Which input cells an output cell depends on, by integer interval algebra on a traced graph.

Along one axis, a chain of local operations makes the output cells ``[a, b)`` depend on the input cells
``[a·stride − before, (b − 1)·stride + after + 1)`` and on nothing else. Two operations in a row compose, two branches that
meet join to the hull of both. Nothing here is measured: three integers an axis follow from the kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from wholeslide.geometry import Size


@dataclass(frozen=True)
class Sampling:
    """One convolution or pooling along one axis: its kernel, stride, padding and dilation, in input cells."""

    kernel: int = 1
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    ceil_mode: bool = False

    @property
    def extent(self) -> int:
        """Input cells from the first tap to the last, both included."""
        return self.dilation * (self.kernel - 1) + 1

    def output_length(self, length: int) -> int:
        """Cells that come out of ``length`` cells, as PyTorch counts them."""
        room = length + 2 * self.padding - self.extent
        if self.ceil_mode:
            cells = -(-room // self.stride) + 1
            # PyTorch drops a last window that would start in the right padding.
            return cells - 1 if (cells - 1) * self.stride >= length + self.padding else cells
        return room // self.stride + 1


@dataclass(frozen=True)
class AxisLocality:
    """How far the cells of one axis reach into the input, and how many there are.

    ``before`` and ``after`` are input cells: output ``j`` depends on inputs ``j·stride − before … j·stride + after``.
    ``path`` holds the samplings of one route from input to output; all routes give the same length.
    """

    stride: int = 1
    before: int = 0
    after: int = 0
    path: tuple[Sampling, ...] = ()

    def then(self, sampling: Sampling) -> AxisLocality:
        """This, followed by one more operation.

        Output ``j`` of the operation needs cells ``j·s − p … j·s − p + extent − 1`` of ours; each of ours needs its own
        reach of the input.
        """
        return AxisLocality(
            stride=self.stride * sampling.stride,
            before=self.before + sampling.padding * self.stride,
            after=self.after + (sampling.extent - 1 - sampling.padding) * self.stride,
            path=(*self.path, sampling),
        )

    def joined(self, other: AxisLocality) -> AxisLocality:
        """Two branches that meet cell by cell: the hull of what they need. Their strides must agree."""
        assert self.stride == other.stride, "branches of different stride"
        longer = self if len(self.path) >= len(other.path) else other
        return AxisLocality(self.stride, max(self.before, other.before), max(self.after, other.after), longer.path)

    def output_length(self, length: int) -> int:
        """Output cells of ``length`` input cells; not positive where the input is too short to give any."""
        for sampling in self.path:
            length = sampling.output_length(length)
            if length <= 0:
                return 0
        return length

    def agrees_in_size(self, other: AxisLocality) -> bool:
        """Whether both give equally many cells, however long the input is.

        One stride more of input gives one cell more, so that one stride's worth of lengths stands for all; those are taken
        that are longer than the reach of both.
        """
        assert self.stride == other.stride, "branches of different stride"
        enough = max(axis.before + axis.after for axis in (self, other)) + self.stride
        lengths = range(enough, enough + self.stride)
        return all(self.output_length(length) == other.output_length(length) for length in lengths)

    @property
    def field(self) -> int:
        """How many input cells one output cell depends on: its receptive field."""
        return self.before + self.after + 1

    @property
    def halo_before(self) -> int:
        """Output cells by which an input window must begin early, so that its start stays aligned to the stride."""
        return max(0, -(-self.before // self.stride))

    @property
    def halo_after(self) -> int:
        """Output cells by which an input window must end late."""
        return max(0, -(-(self.after + 1 - self.stride) // self.stride))


@dataclass(frozen=True)
class Locality:
    """Both axes of a local network: ``x`` along the width, ``y`` along the height."""

    x: AxisLocality = AxisLocality()
    y: AxisLocality = AxisLocality()

    def then(self, x: Sampling, y: Sampling) -> Locality:
        return Locality(self.x.then(x), self.y.then(y))

    def joined(self, other: Locality) -> Locality:
        return Locality(self.x.joined(other.x), self.y.joined(other.y))

    def agrees_in_size(self, other: Locality) -> bool:
        """Whether both give features of one size for any image."""
        return self.x.agrees_in_size(other.x) and self.y.agrees_in_size(other.y)

    @property
    def stride(self) -> int:
        """Input cells per output cell; the two axes of every supported network agree."""
        assert self.x.stride == self.y.stride, "strides differ between the axes"
        return self.x.stride

    def output_size(self, size: Size) -> Size:
        """Output cells of an input of ``size`` cells."""
        return Size(self.x.output_length(size.width), self.y.output_length(size.height))


def compose(parts: Sequence[Locality]) -> Locality:
    """Several local networks in a row."""
    whole = Locality()
    for part in parts:
        whole = Locality(_chain(whole.x, part.x), _chain(whole.y, part.y))
    return whole


def _chain(first: AxisLocality, second: AxisLocality) -> AxisLocality:
    return AxisLocality(
        stride=first.stride * second.stride,
        before=first.before + second.before * first.stride,
        after=first.after + second.after * first.stride,
        path=first.path + second.path,
    )
