"""The small model's initialisation: what training from scratch needs."""

import torch

from lightvla.demo.small_model import grid_positions


def test_positions_tell_patches_apart_and_neighbours_are_alike():
    side = 7
    features = grid_positions(side, 128)
    torch.testing.assert_close(features.mean(0), torch.zeros(128), atol=1e-6, rtol=0)
    distances = torch.cdist(features, features)
    for patch in range(side * side):
        others = [other for other in range(side * side) if other != patch]
        nearest = min(others, key=lambda other, row=distances[patch]: row[other])
        steps = abs(nearest // side - patch // side) + abs(nearest % side - patch % side)
        assert steps == 1
        assert distances[patch, nearest] > 0.5
