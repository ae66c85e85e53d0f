"""The checksum of TFRecord files against its definition and published values."""

import numpy as np
import pytest

from prismatic.vla.datasets.crc32c import crc32c


def bit_by_bit(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def test_published_values():
    """RFC 3720, appendix B.4."""
    assert crc32c(bytes(32)) == 0x8A9136AA and crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E and crc32c(b"123456789") == 0xE3069283


@pytest.mark.parametrize("size", [0, 1, 255, 1023, 1024, 1025, 1279, 1280, 4096, 20_001])
def test_many_bytes_at_once_equal_bit_by_bit(size: int):
    for data in (np.random.default_rng(size).bytes(size), bytes(size)):
        assert crc32c(data) == bit_by_bit(data)
