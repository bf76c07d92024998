"""The engine on a CUDA device equals the reference on the CPU. Run with `-m gpu`."""

from __future__ import annotations

import pytest
import torch

from tiny import FAMILIES, MASK, tiny_model
from unmask.engine.engine import Engine
from unmask.engine.reference import generate_reference
from unmask.engine.request import Request
from unmask.engine.sampling_params import ResolvedParams

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_on_the_device_equals_the_reference(family: str) -> None:
    model = tiny_model(family, 1, torch.float64)
    generator = torch.Generator().manual_seed(0)
    requests = [
        Request(
            tuple(torch.randint(0, MASK, (length,), generator=generator).tolist()),
            ResolvedParams(block_size=4, threshold=threshold, steps=4, edit_threshold=edit, max_new_tokens=12),
            frozenset([3]),
        )
        for length, threshold, edit in ((3, 0.3, None), (8, 0.95, None), (13, 0.5, 0.4), (21, 0.0, None))
    ]
    expected = [generate_reference(model, request, MASK).ids for request in requests]
    engine = Engine(model.cuda(), mask_id=MASK, num_tokens=256)
    assert [completion.ids for completion in engine.run(requests)] == expected
    assert engine.pool.num_used == 0
