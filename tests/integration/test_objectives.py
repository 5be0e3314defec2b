"""TRL's DPO, KTO, GRPO, ORPO and CPO trainers, and losses of one's own in the Hugging Face Trainer.

Where policy and reference are one function, as before the first step, they must be computed as one: DPO's loss is ln 2,
margins and KL are 0, and nothing is clipped. At sparsity 0 every loss is that of the trainer with the plain model.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

from sparselora_dist import SparseLoRACallback, SparseLossMixin
from sparselora_dist.apply import find_state
from sparselora_dist.integrations.objectives import begin_objective, check_reference
from support.models import tiny_base
from support.trainer_workers import arguments, make_sparse, trainer_rows, watch

from .conftest import Tiny, task_rows

pytestmark = pytest.mark.usefixtures("alone")
NONE = {"ffn": {"1-2": 0.0}, "qk": {"1": 0.0}, "vo": {"2": 0.0}}
RUNS = {"plain": None, "at zero": {"layers": NONE}, "sparse": {}, "dense reference": {"reference": "dense"}}
SETTINGS = {
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
}


def model_for(tiny: Tiny, options: dict[str, Any] | None) -> Any:
    """The tiny model with an adapter: plain, or sparse from the first step on."""
    base = AutoModelForCausalLM.from_pretrained(tiny.model, dtype=torch.float32)
    if options is not None:
        model = make_sparse(base, start_step=0.0, **options)
    else:
        torch.manual_seed(1)
        targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
        model = get_peft_model(
            base, LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")
        ).train()
    model.enable_input_require_grads()  # TRL turns gradient checkpointing on by default.
    return model


def run(
    trainer: Any, config: Any, model: Any, tiny: Tiny, folder: Path, rows: list[dict[str, Any]], **settings: Any
) -> tuple[list[dict[str, float]], list[dict]]:
    """A run of a TRL trainer: the rows of its log, and the masks of its steps."""
    others = {key: settings.pop(key) for key in ("reward_funcs",) if key in settings}
    sparse, watcher = find_state(model) is not None, watch()
    made = trainer(
        model=model,
        args=config(output_dir=str(folder), **SETTINGS | settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(tiny.model),
        callbacks=[SparseLoRACallback(), watcher] if sparse else [],
        **others,
    )
    made.train()
    return [row for row in made.state.log_history if "loss" in row], watcher.masks


def pairs() -> list[dict[str, str]]:
    return [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": "xyz" * (1 + i % 3)}
        for i, row in enumerate(task_rows(24, seed=0))
    ]


def column(rows: list[dict[str, float]], name: str) -> list[float]:
    return [float(row[name]) for row in rows]


def check_active(rows: list[dict[str, float]], masks: list[dict]) -> None:
    assert column(rows, "sparsity/active") == [1.0] * len(rows) and all(masks)
    assert all(0.2 < share < 0.95 for share in column(rows, "sparsity/context_share"))


def test_dpo(tiny: Tiny, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    rows, masks = {}, {}
    for name, options in RUNS.items():
        settings = {"max_steps": 1 if "dense" in name else 3, "max_length": 64}
        model = model_for(tiny, options)
        rows[name], masks[name] = run(trl.DPOTrainer, trl.DPOConfig, model, tiny, tmp_path, pairs(), **settings)
    assert column(rows["at zero"], "loss") == pytest.approx(column(rows["plain"], "loss"), abs=1e-5)
    check_active(rows["sparse"], masks["sparse"])
    assert rows["sparse"][0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert float(rows["sparse"][0]["rewards/margins"]) == pytest.approx(0, abs=1e-6)
    assert any(abs(value) > 1e-3 for value in column(rows["sparse"], "rewards/margins")[1:]), "it learns"
    # What a dense reference means, and what was so before.
    assert abs(rows["dense reference"][0]["loss"] - math.log(2)) > 1e-3


def test_kto(tiny: Tiny, tmp_path: Path) -> None:
    """Its KL is that of other completions, whose forward comes first, and whose labels are made anew each time."""
    trl = pytest.importorskip("trl")
    if not hasattr(trl, "KTOTrainer"):
        pytest.skip("this TRL has no KTO trainer")
    examples = [{**row, "label": i % 2 == 0} for i, row in enumerate(task_rows(24, seed=0))]
    settings: dict[str, Any] = {"max_steps": 2, "max_length": 64, "learning_rate": 0.2}
    model = model_for(tiny, {})
    rows, masks = run(trl.KTOTrainer, trl.KTOConfig, model, tiny, tmp_path, examples, **settings)
    check_active(rows, masks)
    first = rows[0]
    assert first["loss"] == pytest.approx(0.5, abs=1e-6)
    assert float(first["rewards/margins"]) == pytest.approx(0, abs=1e-6) and float(first["kl"]) == 0


def even(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [sum(token % 2 == 0 for token in row) / max(1, len(row)) for row in completion_ids]


def test_grpo(tiny: Tiny, tmp_path: Path) -> None:
    """Two prompts a micro-batch; a generation is four micro-batches, in two steps, and trained on twice."""
    trl = pytest.importorskip("trl")
    prompts = [{"prompt": row["prompt"]} for row in task_rows(24, seed=0)]
    settings = {
        "max_steps": 5,
        "num_generations": 2,
        "max_completion_length": 6,
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 4,
        "num_iterations": 2,
        "beta": 0.04,
        "reward_funcs": even,
    }
    rows, masks = {}, {}
    for name, options in RUNS.items():
        model, length = model_for(tiny, options), {"max_steps": 1} if "dense" in name else {}
        made = run(trl.GRPOTrainer, trl.GRPOConfig, model, tiny, tmp_path, prompts, **settings | length)
        rows[name], masks[name] = made
    assert column(rows["at zero"], "loss") == pytest.approx(column(rows["plain"], "loss"), abs=1e-5)
    check_active(rows["sparse"], masks["sparse"])
    first = rows["sparse"][0]
    assert float(first["kl"]) == pytest.approx(0, abs=1e-6) and float(first["clip_ratio/region_mean"]) == 0
    assert float(rows["dense reference"][0]["kl"]) > 1e-3
    steps = masks["sparse"]
    for later, shared in ((1, True), (2, True), (3, True), (4, False)):  # The fifth step has a generation of its own.
        equal = [torch.equal(mask, steps[later][layer][g]) for layer, by in steps[0].items() for g, mask in by.items()]
        assert all(equal) == shared


@pytest.mark.parametrize("kind", ["orpo", "cpo"])
def test_trainers_that_read_the_logits_of_both_answers(kind: str, tiny: Tiny, tmp_path: Path) -> None:
    module = pytest.importorskip(f"trl.experimental.{kind}")
    trainer, config = getattr(module, f"{kind.upper()}Trainer"), getattr(module, f"{kind.upper()}Config")
    sparse_trainer = type("Sparse", (SparseLossMixin, trainer), {})
    rows, masks = {}, {}
    for name in ("plain", "at zero", "sparse"):
        made = trainer if name == "plain" else sparse_trainer
        settings = {"max_steps": 2, "max_length": 64}
        rows[name], masks[name] = run(made, config, model_for(tiny, RUNS[name]), tiny, tmp_path, pairs(), **settings)
    assert column(rows["at zero"], "loss") == pytest.approx(column(rows["plain"], "loss"), abs=1e-5)
    check_active(rows["sparse"], masks["sparse"])
    # ORPO's likelihood reads the chosen prompts, which stay dense.
    share = rows["sparse"][-1]["sparsity/context_share"]
    assert share < 0.5 if kind == "orpo" else share > 0.5


def smooth(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    logits, wanted = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(logits, wanted, label_smoothing=0.1)


@pytest.mark.parametrize("own_loss", [False, True])
def test_label_smoothing_and_a_loss_of_ones_own(own_loss: bool, tmp_path: Path) -> None:
    sparse_trainer = type("Sparse", (SparseLossMixin, Trainer), {})
    losses, watcher, logs = {}, watch(), {}
    for name in ("plain", "at zero", "sparse"):
        settings = {"use_cpu": True, "max_steps": 2, "label_smoothing_factor": 0.0 if own_loss else 0.1}
        options = {"layers": NONE} if name == "at zero" else {}
        model = make_sparse(tiny_base(), start_step=0.0, **options | {"enabled": name != "plain"})
        trainer = (Trainer if name == "plain" else sparse_trainer)(
            model=model,
            args=arguments(tmp_path, **settings),
            train_dataset=trainer_rows(),
            eval_dataset=trainer_rows()[:4],
            compute_loss_func=smooth if own_loss else None,
            callbacks=[SparseLoRACallback(), *([watcher] if name == "sparse" else [])],
        )
        trainer.train()
        logs[name] = [row for row in trainer.state.log_history if "loss" in row]
        losses[name] = column(logs[name], "loss")
        assert math.isfinite(trainer.evaluate()["eval_loss"])
    assert losses["at zero"] == pytest.approx(losses["plain"], abs=1e-5)
    assert losses["sparse"] != pytest.approx(losses["plain"], abs=1e-5)
    check_active(logs["sparse"], watcher.masks)


def test_a_reference_that_is_computed_before_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    settings = {"max_steps": 1, "max_length": 64, "precompute_ref_log_probs": True}
    model = model_for(tiny, {})
    with pytest.raises(ValueError, match=r'precompute_ref_log_probs=True.*reference: "dense"'):
        run(trl.DPOTrainer, trl.DPOConfig, model, tiny, tmp_path, pairs(), **settings)
    context = find_state(model).context
    args: Any = SimpleNamespace(precompute_ref_log_probs=True)
    with pytest.raises(ValueError, match="precompute_ref_log_probs"):
        SparseLoRACallback().on_train_begin(args, None, None, model=model)
    context.sparse_references = False
    check_reference(args, context)


@pytest.mark.parametrize(("loss", "whole"), [("nll", True), ("chunked_nll", False)])
def test_an_sft_trainer_that_reads_every_logit_gets_them(
    loss: str, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As TRL's did before 1.16, for its metrics."""

    class SFTTrainer:
        def compute_loss(self, outputs: Any) -> Any:
            return entropy_from_logits(outputs.logits)  # type: ignore[name-defined]  # noqa: F821

    class SFTConfig:
        loss_type, use_liger_kernel = loss, False

    older: Any = ModuleType("trl.trainer.sft_trainer")
    older.SFTTrainer = SFTTrainer
    monkeypatch.setitem(sys.modules, older.__name__, older)
    model = make_sparse(tiny_base())
    context = find_state(model).context
    begin_objective(arguments("unused", use_cpu=True), context)
    assert context.skip_unused_logits
    begin_objective(SFTConfig(), context)
    assert context.skip_unused_logits != whole
    data = {name: torch.tensor(column)[None] for name, column in trainer_rows()[0].items()}
    assert (model(**data).logits.shape[:2] == data["labels"].shape) == whole
