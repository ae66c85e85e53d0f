"""What a validation says of held-out frames."""

import numpy as np
import pytest
import torch

from prismatic.training.build import build
from prismatic.training.distributed import Ranks
from prismatic.training.loop import validate
from prismatic.vla.datasets.collate import collate
from prismatic.vla.datasets.sampler import SampleRequest


@pytest.mark.parametrize("image_aug", [False, True])
def test_validation_computes_what_inference_computes(flags, image_aug):
    run = build(flags(use_val_set=True, image_aug=image_aug, batch_size=3), Ranks(0, 1, torch.device("cpu")))
    told, stopped = validate(run)
    assert not stopped
    assert run.val_data is not None and told["frames"] == len(run.val_data)
    assert run.val_data.transform.center_crop == image_aug and not run.val_data.augment
    policy_form = run.module.eval()
    losses, errors = [], []
    for index in range(len(run.val_data)):
        sample = run.val_data[SampleRequest(0, index)]
        with torch.no_grad():
            batch = collate([sample], run.val_data.transform.pad_token_id)
            loss, metrics = policy_form(batch)
            moved = {**batch, "actions": batch["actions"] + 10 * torch.eye(7)[2]}
            change = (policy_form(moved)[1].l1_dimensions - metrics.l1_dimensions).abs().sum(0)
        losses.append(loss.item())
        errors.append(metrics.l1_dimensions.numpy())
    assert told["loss"] == pytest.approx(np.mean(losses), abs=1e-6)
    first, others = np.mean(errors, axis=0)
    assert told["l1_current_dimensions"] == pytest.approx(first.tolist(), abs=1e-6)
    assert told["l1_dimensions"] == pytest.approx(((first + 7 * others) / 8).tolist(), abs=1e-6)
    assert np.mean(told["l1_dimensions"]) == pytest.approx(told["loss"], abs=1e-6)  # the head's loss is the L1
    assert told["l1_dimensions"].names == ("x", "y", "z", "rot x", "rot y", "rot z", "gripper")
    assert (change > 1).tolist() == [False, False, True, False, False, False, False]  # z is the third
