"""The adapter is PEFT's: saved, loaded without this package, merged."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from support.applied import families, outputs, sparse_model
from support.harness import without_package
from support.models import FAMILIES, batch, tiny_base


def saved_run(folder: Path, family: str) -> tuple[dict[str, Tensor], Tensor]:
    """Train two steps, save the base and the adapter; a batch and the logits of the dense model."""
    tiny_base(family).save_pretrained(folder / "base")
    model = sparse_model(family)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for seed in range(2):
        outputs(model, batch(seed=seed))
        optimizer.step()
    model.save_pretrained(str(folder / "adapter"))
    data = {name: tensor for name, tensor in batch(seed=9).items() if name != "labels"}
    with torch.no_grad():
        return data, model.eval()(**data).logits


@families
def test_the_saved_adapter_in_plain_peft_is_the_dense_model(family: str, tmp_path: Path) -> None:
    """Equality 8."""
    data, expected = saved_run(tmp_path, family)
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(saved) == 3 * 7 * 2 and all("lora_" in name for name in saved)
    base = FAMILIES[family][1].from_pretrained(tmp_path / "base")
    base_logits = base(**data).logits
    plain = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    got = plain(**data).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got, base_logits, rtol=1e-2, atol=1e-2)


WITHOUT_PACKAGE = without_package("""
try:
    import sparselora_dist
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("the package is importable")

import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM

data, expected = torch.load("expected.pt")
base = AutoModelForCausalLM.from_pretrained("base")
with torch.no_grad():
    got = PeftModel.from_pretrained(base, "adapter").eval()(**data).logits
torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
assert not any(name.startswith("sparselora") for name in sys.modules)
print("same logits")
""")


def test_the_saved_adapter_needs_no_part_of_this_package(tmp_path: Path) -> None:
    """Acceptance 8."""
    torch.save(saved_run(tmp_path, "qwen3"), tmp_path / "expected.pt")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_PACKAGE], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
    )
    assert result.stdout.strip().endswith("same logits"), result.stderr[-2000:]
