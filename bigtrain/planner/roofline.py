"""Seconds of single operations on a device: what limits each, its arithmetic, its memory traffic or the call itself."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from bigtrain.models.operations_cost import FLOAT
from bigtrain.planner.rates import Rates, constants


@dataclass(frozen=True, slots=True)
class Work:
    """Seconds that a device works, and how often Python calls for it."""

    seconds: float = 0.0
    calls: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.seconds + other.seconds, self.calls + other.calls)

    def __mul__(self, times: float) -> Work:
        return Work(self.seconds * times, self.calls * times)

    def called(self, times: float) -> Work:
        """Return the same work, for which Python calls so many times as often."""
        return Work(self.seconds, self.calls * times)


NOTHING = Work()


@dataclass(frozen=True)
class Roofline:
    """Operations at a device's rates. On CUDA with `fused`, pointwise operations are compiled into few kernels."""

    rates: Rates
    fused: bool = False

    def elapsed(self, work: Work) -> float:
        """Return the seconds that work takes: on a CPU the calls add to it, a GPU is fed by calls that run ahead."""
        calling = work.calls * self.rates.call_seconds
        return work.seconds + calling if self.rates.kind == "cpu" else max(work.seconds, calling)

    def product(self, n: int, i: int, o: int, *, operand_bytes: int = FLOAT, result_bytes: int | None = None) -> Work:
        """Multiply (n, i) by (i, o), into fresh memory.

        On a CPU operands and result come from memory at least once: between two uses of a weight the whole model
        passes through the cache, which a product that is measured again and again does not show.
        """
        flops = 2 * n * i * o
        result = n * o * (operand_bytes if result_bytes is None else result_bytes)
        moved = (n * i + i * o) * operand_bytes + result
        if self.rates.kind == "cpu":
            packing = max(self.rates.operand_passes * self._move(moved), moved / self.rates.memory_bytes_per_second)
            return Work(flops / self.rates.product_flops_per_second + packing + self.fresh(result), 1)
        rate = self.rates.product_flops_per_second * self._occupancy(n, i, o)
        return self._kernel(max(flops / rate, self._move(moved)))

    def attention(self, tokens: int, longest: int, width: int, *, causal: bool, backward: bool = False) -> Work:
        """Attend, with heads of `width` numbers together, within full documents of so many tokens.

        Four FLOPs for a number of a query and a key, and 2.5 times that in the backward pass, where the probabilities
        are computed again (Dao 2023, arXiv 2307.08691, section 4).
        """
        flops = 4 * tokens * longest * width * (2.5 if backward else 1)
        share = self.rates.attention_share[backward]
        if self.rates.kind == "cpu":
            flops *= _cpu_causal_share(longest) if causal else 1
            documents = ceil(tokens / longest)
            return Work(flops / (self.rates.product_flops_per_second * share), documents * (12 if backward else 8))
        seconds = flops * (0.5 if causal else 1) / (self.rates.product_flops_per_second * share)
        return self._kernel(seconds, calls=3)

    def pointwise(
        self, elements: int, read_bytes: float, written_bytes: float, kind: str = "", *, in_place: bool = False
    ) -> Work:
        """Read and write so many bytes an element; `kind` names the arithmetic."""
        read, written = elements * read_bytes, elements * written_bytes
        arithmetic = elements * self.rates.arithmetic.get(kind, 0.0) / self.rates.product_flops_per_second
        if self.rates.kind == "cpu":
            filling = 0.0 if in_place else self.fresh(written)
            return Work(max(self._move(read + written), arithmetic) + filling, 1)
        if self.fused:
            part = self._move(read + written) * self.rates.compiled_traffic
            return self._kernel(part, calls=self.rates.compiled_calls)
        return self._kernel(self._move(read + written))

    def fresh(self, size: float) -> float:
        """Return the seconds that newly mapped memory takes to be filled with pages."""
        return size * self.rates.fresh_seconds_per_byte if size >= self.rates.mapped_bytes else 0.0

    def _kernel(self, seconds: float, calls: float = 1) -> Work:
        return Work(seconds + calls * self.rates.kernel_seconds, calls)

    def _move(self, size: float) -> float:
        rates = self.rates
        cached = 0 < size <= rates.cache_bytes
        return size / (rates.cache_bytes_per_second if cached else rates.memory_bytes_per_second)

    def _occupancy(self, n: int, i: int, o: int) -> float:
        """Return the share of a GPU's rate that a product of this shape reaches.

        Its tiles are computed in waves, one on each multiprocessor; where there are fewer of them than multiprocessors,
        the inner dimension is split to fill those. A short inner dimension does not fill the pipeline.
        """
        tile, half_depth = float(constants()["cuda"]["tile"]), float(constants()["cuda"]["depth"])
        tiles, needed = ceil(n / tile) * ceil(o / tile), n / tile * o / tile
        splits = min(ceil(self.rates.multiprocessors / tiles), max(1, int(i / (4 * tile))))
        waves = ceil(tiles * splits / self.rates.multiprocessors)
        depth = i / splits
        return needed * splits / (waves * self.rates.multiprocessors) * depth / (depth + half_depth)


def _cpu_causal_share(longest: int) -> float:
    """Return the share of the scores that torch's causal kernel computes: blocks of 512 keys up to the diagonal.

    Source: aten/src/ATen/native/cpu/FlashAttentionKernel.cpp, torch 2.13.
    """
    if longest <= 512:
        return 1.0
    blocks = longest / 512
    return (blocks + 1) / (2 * blocks)
