"""torch.compile of the model: one graph, the same numbers, and no new one for each size."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import swinv2_scale


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.long)], ids=str)
def test_a_compiled_model_computes_the_same(dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    changes = {"image_size": 64, "window_size": 4, "depths": [1, 2], "num_heads": [1, 2], "num_classes": 10}
    model = swinv2_scale.create_model("debug", **changes, weight_init="research", drop_path_rate=0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)  # norms of a fresh block may be zero
    compiled = torch.compile(model.to(dtype).train(), fullgraph=True, backend=counter)
    for size in (64, 96, 128):
        images = torch.randn(2, 3, size, size, dtype=dtype)
        gradients = []
        for run in (model, compiled):
            model.zero_grad()
            torch.manual_seed(size)  # of drop path, whose branches a compiler computes and the model itself does not
            out = run(images)
            out.float().square().sum().backward()
            gradients.append((out, *(parameter.grad for parameter in model.parameters())))
        bound = 1e-5 if dtype == torch.float32 else 5e-2
        for own, theirs in zip(*gradients, strict=True):
            assert (own - theirs).norm() <= bound * own.norm() + 1e-6
    assert counter.frame_count <= 2
