"""Keys and values in 8 bits: e4m3 of the Open Compute Project's OFP8 (2023), 4 bits of exponent, 3 of mantissa, no
infinity, largest 448, least 2^-9, and one NaN for each sign.

In integers, as the hardware's own conversions begin at compute capability 8.9: every GPU and the interpreter give the
same bytes. To a byte: nearest, ties to even, beyond 448 the largest, NaN stays NaN. From a byte nothing is rounded:
each is a float16 of the same bits, shifted by one, times 2^8. Twins: reference.to_e4m3, reference.from_e4m3.
"""

import triton
import triton.language as tl


@triton.jit
def to_e4m3(number):
    """float32 -> uint8 of the same shape."""
    bits = number.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    is_nan = size > 0x7F800000
    size = tl.minimum(size, 0x43E00000)  # 448
    # From 2^-6 on: 20 of 23 bits of mantissa go, half of them and the last that stays decide; the exponent begins
    # 120 later. Below, steps are 2^-9, which is one unit in the last place of the numbers from 2^14 on.
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    small = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) & 0xFF
    byte = tl.where(size >= 0x3C800000, normal, small)  # 2^-6
    return (tl.where(is_nan, 0x7F, byte) | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def from_e4m3(byte, dtype: tl.constexpr):
    """uint8 -> float32, float16 or bfloat16, each of which has every number of e4m3."""
    wide = byte.to(tl.int16)
    number = (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.where((wide & 0x7F) == 0x7F, float("nan"), number).to(dtype)
