"""What is seen inside a backbone is what is there, and only when someone looks."""

import pytest
import torch

import swinv2_scale
from swinv2_scale.models import memory
from swinv2_scale.models.probe import BlockProbe


@pytest.mark.parametrize("activations", ["keep", "recompute", "offload"])
def test_amplitudes_and_scales_of_each_block(activations: str) -> None:
    torch.manual_seed(0)
    model = swinv2_scale.create_model("debug", num_classes=10).train()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    policy = {"stages": None, "every": 1, "attention": "auto", "attention_stages": None, "mlp_tokens": 0}
    memory.apply(model, activations=activations, **policy)
    probe, images = BlockProbe(model), torch.randn(2, 3, 64, 64)
    model(images).sum().backward()
    assert probe.take() == {}
    probe.watching = True
    model(images).sum().backward()
    found = probe.take()
    blocks = [block for stage in model.blocks() for block in stage]
    assert {len(values) for values in found.values()} == {len(blocks)}
    maps = model.forward_features(images)
    last = [sum(len(stage) for stage in model.blocks()[: number + 1]) - 1 for number in range(len(maps))]
    for number, feature_map in zip(last, maps, strict=True):
        assert found["amplitude"][number] == pytest.approx(feature_map.square().mean().sqrt().item(), rel=1e-5)
    scales = [block.attn.logit_scale.exp().clamp(max=100) for block in blocks]
    assert found["logit_scale_mean"] == pytest.approx([scale.mean().item() for scale in scales])
    assert found["logit_scale_max"] == pytest.approx([scale.max().item() for scale in scales])
    probe.watching = False
    assert probe.take() != {} and probe.take() == {}  # of the pass through forward_features, then nothing
