"""The controls of an evaluation: what is changed to learn what a success means."""

TOKEN_CONTROLS = {"random_tokens": "instead", "added_tokens": "added", "dropped_tokens": "dropped"}
"""Those that change what LightVLA keeps -> what the pruner `random` then draws."""
CONTROLS = ("none", "blank_images", "swapped_instruction", *TOKEN_CONTROLS)
