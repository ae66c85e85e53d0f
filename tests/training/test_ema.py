import torch
from torch import nn

from prismatic.training.ema import WeightAverage


def test_average_follows_its_definition_and_leaves_the_weights_alone():
    weight = nn.Parameter(torch.zeros(3))
    average = WeightAverage({"w": weight}, decay=0.5)
    expected = torch.zeros(3)
    for step in range(1, 40):
        weight.data += torch.arange(3.0)
        raw = weight.detach().clone()
        average.update(step)
        momentum = min(0.5, step / (step + 20))
        expected = momentum * expected + (1 - momentum) * raw
        assert torch.equal(weight, raw)
    torch.testing.assert_close(average.state_dict()["w"], expected)


def test_applied_swaps_and_restores_exactly():
    module = nn.Linear(2, 2)
    parameters = dict(module.named_parameters())
    average = WeightAverage(parameters, decay=0.9)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with torch.no_grad():
        module.weight.add_(1.0)
    with average.applied():
        assert torch.equal(module.weight, before["weight"])
    assert torch.equal(module.weight, before["weight"] + 1.0)


def test_state_survives_a_round_trip():
    parameters = {"w": nn.Parameter(torch.ones(2))}
    first, second = WeightAverage(parameters, 0.9), WeightAverage({"w": nn.Parameter(torch.zeros(2))}, 0.9)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.state_dict()["w"], torch.ones(2))
