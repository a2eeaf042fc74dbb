"""The published architectures at their full size, weights random: the graphs of real shapes are right.

On a GPU in float16, against the same model in float32; on a CPU the smallest of them in float32.
"""

from __future__ import annotations

import pytest
import torch
from harness import Harness, masks
from published import MODELS, arguments, build

pytestmark = pytest.mark.nightly

CASES = [(name, "cuda", torch.float16) for name in MODELS] if torch.cuda.is_available() else []
TOLERANCES = {torch.float32: 2e-5, torch.float16: 1e-2}


@pytest.mark.parametrize(("name", "device", "dtype"), [("SD1.5", "cpu", torch.float32), *CASES])
def test_published_architectures(name: str, device: str, dtype: torch.dtype) -> None:
    published = MODELS[name]
    size = published.size if device == "cuda" else (16, 24)
    model = build(published, device, torch.float32)
    with torch.no_grad():
        wanted = model(**arguments(published, size, device, torch.float32))[0]
    harness = Harness(model.to(dtype), arguments(published, size, device, dtype))
    assert harness.program.islands == []
    bound = TOLERANCES[dtype] * wanted.abs().max()
    assert (harness.recorded.float() - wanted).abs().max() <= bound
    chosen = masks(size)
    for kind in ("all", "blob", "corners", "ragged"):
        mask = chosen[kind].to(device)
        out = harness.edit(mask)
        assert (out.float() - wanted)[..., mask].abs().max() <= bound, kind
        assert torch.equal(out[..., ~mask], harness.recorded[..., ~mask])
    apart = torch.stack([chosen["blob"], chosen["ragged"]]).to(device)
    out = harness.edit(apart)
    assert all((out[i].float() - wanted[i])[:, apart[i]].abs().max() <= bound for i in (0, 1))
