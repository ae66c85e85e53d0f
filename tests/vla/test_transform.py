"""From sentences to ids."""

import numpy as np

from prismatic.vla import transform
from prismatic.vla.prompt import TokenIds
from prismatic.vla.robots import LIBERO


def test_only_so_many_sentences_are_remembered(monkeypatch):
    """A server is sent ever new ones."""
    monkeypatch.setattr(transform, "_SENTENCES_KEPT", 3)
    pixels = transform.PixelSpec(224, ((0.5, 0.5, 0.5),), ((0.5, 0.5, 0.5),))
    tokenized: list[str] = []

    def tokenize(text: str) -> list[int]:
        tokenized.append(text)
        return [1, *text.encode()]

    policy_transform = transform.PolicyTransform(LIBERO, pixels, tokenize, TokenIds(), {})
    first = policy_transform.input_ids("open drawer 0")
    for number in range(10):
        for _ in range(2):
            policy_transform.input_ids(f"open drawer {number}")
        assert len(policy_transform._ids) <= 3
    assert len(tokenized) == 10, "a sentence that comes again at once is not tokenised again"
    np.testing.assert_array_equal(policy_transform.input_ids("open drawer 0"), first)
