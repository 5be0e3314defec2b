"""Other people's training loops: the Hugging Face Trainer, alone and with DeepSpeed, and TRL's SFTTrainer."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
import transformers.trainer
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerControl, TrainerState
from transformers.models.llama.modeling_llama import LlamaMLP

from sparselora_dist import SparseLoRACallback, selection
from sparselora_dist.apply import find_state
from sparselora_dist.method.tokens import partition_tokens
from support.compare import assert_close
from support.harness import run_ranks
from support.models import tiny_base
from support.trainer_workers import STEPS, arguments, make_sparse, train, trainer_rows, watch

from .conftest import Tiny, task_rows

pytestmark = pytest.mark.usefixtures("alone")
# The tiny model's groups by layer.
CHOSEN = {1: {"ffn", "qk"}, 2: {"vo"}}
# Who says which column of a row.
SAYS = {"user": "prompt", "assistant": "completion"}


def rows(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [row for row in history if "loss" in row]


def losses(history: list[dict[str, float]]) -> list[float]:
    return [row["loss"] for row in rows(history)]


def check_schedule(history: list[dict[str, float]], masks: list[dict], steps: int = STEPS) -> None:
    """The first half of the steps is dense, the second sparse: in the log, and in what was chosen."""
    half = steps // 2
    assert [row["sparsity/active"] for row in rows(history)] == [0.0] * half + [1.0] * half
    shares = [row["sparsity/context_share"] for row in rows(history)]
    assert shares[:half] == [0.0] * half and all(0.2 < share < 0.9 for share in shares[half:])
    assert masks[:half] == [{}] * half
    for chosen in masks[half:]:
        assert {layer: set(groups) for layer, groups in chosen.items()} == CHOSEN
        assert [len(chosen[1]["ffn"]), len(chosen[1]["qk"]), len(chosen[2]["vo"])] == [32, 4, 8]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[dict]]:
    """One run with the Trainer alone: the trainer, and the masks of each step."""
    folder = tmp_path_factory.mktemp("plain")
    training = arguments(folder, use_cpu=True, eval_strategy="steps", eval_steps=STEPS // 2, eval_on_start=True)
    trainer, masks = train(make_sparse(tiny_base()), training, evaluate=True)
    trainer.save_model(str(folder))
    return trainer, masks


def test_the_trainer_alone_learns_and_switches(plain: tuple[Any, list[dict]]) -> None:
    trainer, masks = plain
    history = trainer.state.log_history
    check_schedule(history, masks)
    values = losses(history)
    assert all(math.isfinite(value) for value in values)
    assert sum(values[-2:]) < 0.9 * sum(values[:2])


def test_evaluation_is_dense_and_the_saved_adapter_is_plain_peft(plain: tuple[Any, list[dict]]) -> None:
    trainer, _ = plain
    evaluations = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert len(evaluations) == 3 and evaluations[-1] < evaluations[0]
    counts = find_state(trainer.model).context.counts
    before = counts.dense, counts.context, selection(trainer.model).keys()
    again = trainer.evaluate()["eval_loss"]
    assert (counts.dense, counts.context, selection(trainer.model).keys()) == before
    assert again == evaluations[-1]

    folder = Path(trainer.args.output_dir)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in folder.iterdir()}
    reloaded = PeftModel.from_pretrained(tiny_base(), folder).eval()
    batch = {name: torch.tensor([row[name] for row in trainer_rows()[:6]]) for name in trainer_rows()[0]}
    with torch.no_grad():
        expected, got = trainer.model.eval()(**batch), reloaded(**batch)
    assert_close("logits", expected.logits, got.logits)
    assert float(got.loss) == pytest.approx(evaluations[-1], rel=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_agrees(plain: tuple[Any, list[dict]], tmp_path: Path, reentrant: bool) -> None:
    model = make_sparse(tiny_base())
    if reentrant:
        model.enable_input_require_grads()
    kwargs = {"use_reentrant": reentrant}
    training = arguments(tmp_path, use_cpu=True, gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs)
    trainer, masks = train(model, training)
    check_schedule(trainer.state.log_history, masks)
    assert losses(trainer.state.log_history) == pytest.approx(losses(plain[0].state.log_history), rel=1e-5)
    for one, other in zip(plain[1], masks, strict=True):
        assert all(torch.equal(one[layer][group], other[layer][group]) for layer in one for group in one[layer])


def test_gradient_accumulation_agrees(plain: tuple[Any, list[dict]], tmp_path: Path) -> None:
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer, masks = train(make_sparse(tiny_base()), arguments(tmp_path, use_cpu=True, **options))
    check_schedule(trainer.state.log_history, masks)
    got, expected = losses(trainer.state.log_history), losses(plain[0].state.log_history)
    assert got[: STEPS // 2] == pytest.approx(expected[: STEPS // 2], rel=1e-5)
    # Sparse, each micro-batch chooses its own channels.
    assert got[STEPS // 2 :] == pytest.approx(expected[STEPS // 2 :], rel=0.05)


@pytest.mark.parametrize("restore_callbacks", [False, True])
def test_kept_masks_are_in_the_checkpoint(tmp_path: Path, restore_callbacks: bool) -> None:
    """Resumed within the four steps that masks are kept for: the same masks and losses, bit for bit."""
    settings: dict[str, Any] = {"use_cpu": True, "restore_callback_states_from_checkpoint": restore_callbacks}
    settings |= {"save_strategy": "steps", "save_steps": 6}
    whole, masks = train(make_sparse(tiny_base(), interval=4), arguments(tmp_path, **settings))
    check_schedule(whole.state.log_history, masks)
    model, checkpoint = make_sparse(tiny_base(), interval=4), str(tmp_path / "checkpoint-6")
    resumed, again = train(model, arguments(tmp_path / "again", **settings), resume=checkpoint)
    assert resumed.state.global_step == STEPS and len(again) == STEPS - 6
    for one, other in zip(masks[6:], again, strict=True):
        assert all(torch.equal(one[layer][group], other[layer][group]) for layer in one for group in one[layer])
    assert losses(resumed.state.log_history) == losses(whole.state.log_history)
    # A new run with the same model chooses anew.
    trainer, fresh = train(model, arguments(tmp_path / "new", **settings))
    assert trainer.state.global_step == len(fresh) == STEPS
    assert any(not torch.equal(masks[4][layer][g], fresh[4][layer][g]) for layer in masks[4] for g in masks[4][layer])


def test_masks_of_each_rank_alone_come_back_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks that choose for themselves, here one after the other in one process."""
    model = make_sparse(tiny_base(), interval=4, mask_sync="local")
    context, control = find_state(model).context, TrainerControl(should_save=True)
    masks = [{"1.ffn.3": torch.tensor([2, 5])}, {"1.ffn.3": torch.tensor([0, 7, 9])}]

    def gather(into: list[Any], mine: Any, group: None = None) -> None:
        into[:] = [{name: " ".join(map(str, mask.tolist())) for name, mask in rank.items()} for rank in masks]
        assert mine == into[0]

    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda group=None: 2)
    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    context.held.load_state_dict(masks[0])
    writer, training = SparseLoRACallback(), arguments("unused", use_cpu=True)
    writer.on_step_end(training, TrainerState(), control, model=model)
    saved = json.loads(json.dumps({"SparseLoRACallback": writer.state()}))
    for rank, expected in enumerate(masks):
        monkeypatch.setattr("torch.distributed.get_rank", lambda rank=rank: rank)
        SparseLoRACallback().on_train_begin(
            training, TrainerState(global_step=4, stateful_callbacks=saved), control, model=model
        )
        got = context.held.state_dict()
        assert got.keys() == expected.keys() and torch.equal(got["1.ffn.3"], expected["1.ffn.3"])
    monkeypatch.setattr("torch.distributed.get_world_size", lambda group=None: 3)
    state = TrainerState(global_step=4, stateful_callbacks=saved)
    SparseLoRACallback().on_train_begin(training, state, control, model=model)
    assert context.held.state_dict() == {}


@pytest.mark.parametrize("own_loss", [False, True])
def test_without_labels_the_log_says_dense(tmp_path: Path, own_loss: bool) -> None:
    """Label smoothing and a loss of one's own take the labels out before the model is called."""

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    training = arguments(tmp_path, use_cpu=True, max_steps=2, label_smoothing_factor=0.0 if own_loss else 0.1)
    with pytest.warns(UserWarning, match="without labels and was computed densely"):
        trainer, masks = train(
            make_sparse(tiny_base(), start_step=0.0), training, compute_loss_func=loss if own_loss else None
        )
    assert masks == [{}, {}]
    assert [row["sparsity/active"] for row in rows(trainer.state.log_history)] == [0.0, 0.0]
    assert [row["sparsity/context_share"] for row in rows(trainer.state.log_history)] == [0.0, 0.0]


def test_the_callback_needs_a_sparse_model(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer

    model = get_peft_model(tiny_base(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    args, callbacks = arguments(tmp_path, use_cpu=True), [SparseLoRACallback()]
    with pytest.raises(ValueError, match="apply_sparselora"):
        Trainer(model=model, args=args, train_dataset=trainer_rows(), callbacks=callbacks).train()


@pytest.mark.parametrize("swiglu", [True, False])
def test_a_replaced_ffn_is_refused(swiglu: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Trainer applies Liger to the instance when training begins; here a stand-in does as Liger's patch."""

    def patch(model: Any, kernel_config: dict[str, bool] | None) -> None:
        if (kernel_config or {}).get("swiglu", True):
            for layer in model.get_base_model().model.layers:
                layer.mlp.forward = MethodType(LlamaMLP.forward, layer.mlp)

    monkeypatch.setattr(transformers.trainer, "apply_liger_kernel", patch)
    settings = {"use_liger_kernel": True, "liger_kernel_config": {"swiglu": swiglu}, "max_steps": 1}
    model, training = make_sparse(tiny_base()), arguments(tmp_path, use_cpu=True, **settings)
    if not swiglu:
        assert train(model, training)[0].state.global_step == 1
        return
    with pytest.raises(ValueError, match=r'layers\.1\.mlp was replaced.*liger_kernel_config={"swiglu": False}'):
        train(model, training)


@pytest.fixture(scope="module")
def deepspeed_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, dict[str, Any]]]]:
    folder = tmp_path_factory.mktemp("deepspeed")
    tiny_base().save_pretrained(folder / "base")
    return folder, run_ranks("support.trainer_workers:with_deepspeed", 2, str(folder / "base"), str(folder))


@pytest.mark.parametrize("case", ["whole", "partitioned"])
def test_with_deepspeed_on_two_ranks(
    case: str, plain: tuple[Any, list[dict]], deepspeed_ranks: tuple[Path, list[dict[str, dict[str, Any]]]]
) -> None:
    folder, ranks = deepspeed_ranks
    for result in (rank[case] for rank in ranks):
        assert result["at_load"] == (case == "partitioned")
        for kind, (held, whole) in result["sizes"].items():
            assert 0.5 <= held / whole < 0.53, kind
        for one, other in zip(plain[1], result["masks"], strict=True):
            assert one.keys() == other.keys()
            assert all(torch.equal(one[layer][group], other[layer][group]) for layer in one for group in one[layer])
    history = ranks[0][case]["log"]
    check_schedule(history, ranks[0][case]["masks"])
    assert losses(history) == pytest.approx(losses(plain[0].state.log_history), rel=1e-4)

    saved = load_file(folder / case / "adapter_model.safetensors")
    expected = load_file(Path(plain[0].args.output_dir) / "adapter_model.safetensors")
    assert saved.keys() == expected.keys()
    for name in expected:
        assert_close(name, expected[name], saved[name].float(), 1e-2, 1e-3)
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    reloaded = PeftModel.from_pretrained(base, folder / case).eval()
    ids = torch.tensor([row["input_ids"] for row in trainer_rows()[:2]])
    with torch.no_grad():
        assert_close("logits", plain[0].model.eval()(input_ids=ids).logits, reloaded(input_ids=ids).logits, 1e-2, 1e-2)


def sft(
    tiny: Tiny, folder: Path, data: list[dict[str, Any]] | None = None, template: str | None = None, **settings: Any
) -> tuple[list[dict[str, float]], list[dict], set[str]]:
    """A sparse run of TRL's SFTTrainer: its history, the masks of its steps, and what the model was called with."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    torch.manual_seed(0)
    model = make_sparse(AutoModelForCausalLM.from_pretrained(tiny.model, dtype=torch.float32))
    model.enable_input_require_grads()  # TRL turns gradient checkpointing on by default.
    given: set[str] = set()
    model.register_forward_pre_hook(  # Up to PEFT 0.20 it calls the base model past its hooks.
        lambda _, args, kwargs: given.update(name for name, value in kwargs.items() if value is not None),
        with_kwargs=True,
    )
    training = trl.SFTConfig(
        **{
            "output_dir": str(folder),
            "max_steps": STEPS,
            "per_device_train_batch_size": 8,
            "learning_rate": 2e-2,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "bf16": False,
            "max_length": 64,
        }
        | settings
    )
    watcher = watch()
    tokenizer = AutoTokenizer.from_pretrained(tiny.model)
    tokenizer.chat_template = template
    trainer = trl.SFTTrainer(
        model=model,
        args=training,
        train_dataset=Dataset.from_list(data or task_rows(64, seed=0)),
        processing_class=tokenizer,
        callbacks=[SparseLoRACallback(), watcher],
    )
    trainer.train()
    return trainer.state.log_history, watcher.masks, given


def test_trl_sft_trainer(tiny: Tiny, tmp_path: Path) -> None:
    history, masks, _ = sft(tiny, tmp_path)
    check_schedule(history, masks)
    values = losses(history)
    assert sum(values[-2:]) < 0.9 * sum(values[:2])


def test_trl_padding_free(tiny: Tiny, tmp_path: Path) -> None:
    """The same batches as rows in a line, which TRL tells apart by their positions: the same run."""
    padded, _, _ = sft(tiny, tmp_path / "padded")
    history, masks, given = sft(tiny, tmp_path / "free", padding_free=True, max_length=None)
    assert "position_ids" in given and "attention_mask" not in given
    check_schedule(history, masks)
    torch.testing.assert_close(torch.tensor(losses(history)), torch.tensor(losses(padded)), rtol=2e-4, atol=0)


def test_trl_packing(tiny: Tiny, tmp_path: Path) -> None:
    history, masks, given = sft(tiny, tmp_path, packing=True)
    assert "position_ids" in given and "attention_mask" not in given
    check_schedule(history, masks)
    assert all(0 < row["sparsity/context_share"] < 1 for row in rows(history)[STEPS // 2 :])


def test_trl_assistant_only_loss(tiny: Tiny, tmp_path: Path) -> None:
    """Conversations: what the user says is context, wherever it stands. A first turn alone is prompt and completion."""
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}"
        "{% else %}{% generation %}{{ m.content + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    )
    asked = task_rows(8, seed=0)
    turns = [[{"role": r, "content": row[c]} for r, c in SAYS.items()] for row in asked]
    options: dict[str, Any] = {"template": template, "assistant_only_loss": True, "max_length": None}
    plain, _, _ = sft(tiny, tmp_path / "plain", asked)
    history, masks, _ = sft(tiny, tmp_path / "one", [{"messages": turn} for turn in turns], **options)
    check_schedule(history, masks)
    assert losses(history) == losses(plain)

    both = [first + second for first, second in zip(turns, turns[1:] + turns[:1])]
    history, masks, _ = sft(tiny, tmp_path / "two", [{"messages": said} for said in both], **options)
    check_schedule(history, masks)
    tokenizer = AutoTokenizer.from_pretrained(tiny.model)
    dense = context = 0
    for said in both:  # A batch has no context in its padding, so rows can be counted one by one.
        labels: list[int] = []
        for turn in said:
            ids = tokenizer(turn["content"], add_special_tokens=False)["input_ids"]
            labels += [-100] * len(ids) if turn["role"] == "user" else [*ids, tokenizer.eos_token_id]
        tokens = partition_tokens(torch.tensor([labels]))
        dense, context = dense + tokens.dense.numel(), context + tokens.context.numel()
    assert rows(history)[-1]["sparsity/context_share"] == pytest.approx(context / (dense + context))
