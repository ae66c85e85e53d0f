"""The crop that policies are trained with."""

CROP_AREA = 0.9
"""Share of the picture that a random crop keeps in training, and the central one afterwards."""
