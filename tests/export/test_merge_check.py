"""What `merge --check` says of merged models: ours, PEFT's, and those that are not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import small
import torch
from merging import write_adapter
from safetensors.torch import load_file, save_file

from lowtide.errors import ModelError
from lowtide.export.compare import Difference, compare, spacing
from lowtide.export.merge import merge
from lowtide.model.quantized import quantize_model

FILE = "model.safetensors"
NAME = "llama-biases-llama3"
Q = "model.layers.1.self_attn.q_proj.weight"


def by_name(found: list[Difference]) -> dict[str, Difference]:
    return {one.name: one for one in found}


def test_comparing_a_merged_model(tmp_path: Path) -> None:
    model = small.write_small_model(tmp_path / "model")
    adapter = write_adapter(model, tmp_path / "adapter", target_modules="q_proj,up_proj")
    merge(model, adapter, tmp_path / "out", dtype="bfloat16")
    found = by_name(compare(tmp_path / "out", model, adapter))
    assert all(one.problem is None for one in found.values())
    assert sum(one.adapted for one in found.values()) == 4
    assert 0.4 < max(one.worst_units for one in found.values() if one.adapted) <= 0.5 + 2**-16
    tensors = load_file(tmp_path / "out" / FILE)
    norm, down = "model.layers.0.input_layernorm.weight", "model.layers.1.mlp.down_proj.weight"
    step = spacing(tensors[Q].double().abs(), torch.bfloat16)
    tensors[norm][:2] += 2**-7
    tensors[down][0, 0] *= -1
    tensors[Q][2, 3] += 3 * step[2, 3].bfloat16()
    save_file(tensors, tmp_path / "out" / FILE)
    found = by_name(compare(tmp_path / "out", model, adapter))
    problems = {name for name, one in found.items() if one.problem is not None}
    assert problems == {norm, down, Q}
    assert (
        found[norm].problem == f"{norm}: 2 elements are not the base, which it should be; 1 units"
    )
    assert found[down].wrong == 1
    assert 2.5 <= found[Q].worst_units <= 3.51


def test_comparing_what_peft_merged(odd_model: Callable[..., Path], tmp_path: Path) -> None:
    """In float32, where PEFT's products are rounded too."""
    import transformers
    from peft import PeftModel

    model = odd_model(NAME)
    adapter = write_adapter(model, tmp_path / "adapter", lora_alpha=0.2)
    base = transformers.AutoModelForCausalLM.from_pretrained(model)
    PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(tmp_path / "peft")
    found = compare(tmp_path / "peft", model, adapter)
    assert [one.problem for one in found if one.problem] == []
    with pytest.raises(ModelError, match=r"q_proj.weight: \[32, 32\] merged, \[50, 45\] in the b"):
        compare(small.write_small_model(tmp_path / "other"), model, adapter)
    quantize_model(str(tmp_path / "peft"), tmp_path / "int8", "int8")
    with pytest.raises(ModelError, match=r"is quantised \(int8\)"):
        compare(tmp_path / "int8", model, adapter)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_spacings(dtype: torch.dtype) -> None:
    """Against the next number up, found by its bits."""
    info = torch.finfo(dtype)
    values = torch.tensor([0, info.tiny / 4, info.tiny, 1e-3, 0.75, 1.0, 1.9, 2.0, 300.0]).to(dtype)
    integers = values.view(torch.int32 if dtype == torch.float32 else torch.int16)
    above = (integers + 1).view(dtype)
    assert spacing(values.double(), dtype).equal(above.double() - values.double())
