"""The order of an epoch: a keyed permutation of [0, n), computed and not stored.

As csrc/token_loader.cpp has it. In Python's integers, cut to 64 bits by hand: numpy's take ten
times as long for a single value.
"""

ROUNDS = 8
GOLDEN = 0x9E3779B97F4A7C15
MASK = (1 << 64) - 1


def mix(z: int) -> int:
    """The finalizer of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number
    generators, 2014)."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


def epoch_key(seed: int, epoch: int) -> int:
    """The key of an epoch's permutation."""
    return mix(mix(seed + GOLDEN & MASK) + GOLDEN * (epoch + 1) & MASK)


def permute(index: int, n: int, key: int) -> int:
    """Where a keyed permutation of [0, n) takes index: a Feistel network with cycle walking."""
    bits = max(2, (n - 1).bit_length())
    low_bits = bits // 2
    low_mask, high_mask = (1 << low_bits) - 1, (1 << (bits - low_bits)) - 1
    while True:
        low, high = index & low_mask, index >> low_bits
        for r in range(0, ROUNDS, 2):
            low ^= mix(high + key + GOLDEN * (r + 1) & MASK) & low_mask
            high ^= mix(low + key + GOLDEN * (r + 2) & MASK) & high_mask
        index = high << low_bits | low
        if index < n:
            return index
