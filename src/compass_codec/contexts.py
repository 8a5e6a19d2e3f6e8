"""What the symbols that are known tell of those beside them.

The symbols of y are coded in four phases, each of them every second row of every second column. From the second phase
on, the eight around a symbol, of its own channel, are known in part: how large they are, next to what their scale
indices let expect, says how large it will be; and a weighted sum of them, of which sign. Both are integers, so that
encoder and decoder agree everywhere.
"""

from __future__ import annotations

import numpy as np

PHASES = ((0, 0), (1, 1), (0, 1), (1, 0))  # first row and column of each
AROUND = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))  # rows and columns away
CLOSE = (1, 2, 1, 2, 2, 1, 2, 1)  # how much each of them counts
UNIT = 64  # of expected magnitudes and of weights
LARGEST = 255  # what larger magnitudes count as
RATIOS = (2, 5, 8, 12, 17, 26, 42)  # sixteenths of what was expected, where the next class of magnitudes begins
LEANS = (4, 12, 30)  # sixty-fourths of what was expected, where the next class of sums begins
COUNT = (len(RATIOS) + 1) * (len(LEANS) + 1)


class Neighbourhood:
    """The known symbols of a few channels of y, phase by phase.

    ``expected`` int32 [channels, h, w]: magnitudes that the scale indices let expect, in units of 1 / UNIT;
    ``weights`` int32 [phases - 1, channels, 8]: those of the sum.
    """

    def __init__(self, expected: np.ndarray, weights: np.ndarray) -> None:
        self.shape, self.weights = expected.shape, weights
        border = ((0, 0), (1, 1), (1, 1))
        self.coming = np.pad(expected, border)
        self.symbols, self.magnitudes, self.expected = (np.zeros_like(self.coming) for _ in range(3))

    def part(self, whole: np.ndarray, phase: int, off: tuple[int, int] = (0, 0)) -> np.ndarray:
        """What of a padded array lies ``off`` the symbols of a phase."""
        (row, column), (_, h, w) = PHASES[phase], self.shape
        return whole[:, 1 + row + off[0] : 1 + h + off[0] : 2, 1 + column + off[1] : 1 + w + off[1] : 2]

    def look(self, phase: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each symbol of a phase after the first: its context, 0..COUNT - 1, and the sign (1 or -1) it leans to."""
        seen, expected, lean = (np.zeros(self.part(self.coming, phase).shape, np.int32) for _ in range(3))
        for k, (off, close) in enumerate(zip(AROUND, CLOSE, strict=True)):
            seen += close * self.part(self.magnitudes, phase, off)
            expected += close * self.part(self.expected, phase, off)
            lean += self.weights[phase - 1, :, k, None, None] * self.part(self.symbols, phase, off)
        ratio = 16 * (UNIT * seen + UNIT // 2) // (expected + UNIT // 2)
        share = UNIT * np.abs(lean) // (self.part(self.coming, phase) + UNIT // 8)
        context = np.searchsorted(RATIOS, ratio, "right") * (len(LEANS) + 1) + np.searchsorted(LEANS, share, "right")
        return context, np.where(lean < 0, -1, 1).astype(np.int32)

    def put(self, phase: int, symbols: np.ndarray) -> None:
        """The symbols of a phase become known."""
        near = np.clip(symbols, -LARGEST, LARGEST)
        self.part(self.symbols, phase)[:] = near
        self.part(self.magnitudes, phase)[:] = np.abs(near)
        self.part(self.expected, phase)[:] = self.part(self.coming, phase)
