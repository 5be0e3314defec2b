"""LoSA: how alike layers are, zeros under an adapter, adapters at other ranks, and the rounds, on one rank and two."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sparselora_dist.cli import main
from sparselora_dist.config.run import RunConfig
from sparselora_dist.io.merge import merge_adapter
from sparselora_dist.io.pretrained import read_tokenizer
from sparselora_dist.io.shard_files import TensorFiles
from sparselora_dist.layerwise.calibration import read_sequences
from sparselora_dist.pruning.layer_adapter import LayerAdapter
from sparselora_dist.pruning.losa import losa
from sparselora_dist.pruning.prune import prune
from sparselora_dist.pruning.resize import patterns, resized
from sparselora_dist.pruning.similarity import layer_similarity
from sparselora_dist.train import run
from support.harness import run_ranks
from support.losa_workers import LENGTH, SEQUENCES, SHARES, adapted, asked, everything, parts
from support.merging import load, make_adapter, tensors
from support.models import ALL_LINEAR

from ..integration.conftest import VOCABULARY, Tiny, byte_tokenizer, task_rows, tiny_base, write_rows


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process, whatever tests before this one left."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_base(vocab_size=VOCABULARY).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    write_rows(folder / "train.jsonl", task_rows(64, seed=0))
    write_rows(folder / "eval.jsonl", task_rows(10, seed=1))
    make_adapter(folder / "adapter", folder / "model")
    return Tiny(folder)


def config(tiny: Tiny, engine: str = "single") -> dict[str, Any]:
    lora = {"r": 4, "lora_alpha": 8, "target_modules": ALL_LINEAR}
    train = {"max_steps": 4, "save_steps": None, "learning_rate": 1e-2}
    return tiny.config(engine, "unused", lora=lora, train=train, sparse_lora={"enabled": False})


def words(tiny: Tiny, folder: Path) -> tuple[str, str, str, str]:
    return str(folder), tiny.model, tiny.train, str(tiny.folder / "adapter")


@pytest.fixture(scope="module")
def one(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with its adapter, pruned on one rank; the Gram matrices in ``grams.pt``."""
    folder = tmp_path_factory.mktemp("one")
    torch.save(parts(*words(tiny, folder), ("wanda", "sparsegpt")), folder / "grams.pt")
    return folder


@pytest.fixture(scope="module")
def whole(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rounds, by the command."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "run.json").write_text(json.dumps(config(tiny)))
    options = ["--rounds", 2, "--sequences", SEQUENCES, "--similar", 8, "--length", LENGTH, "--ranks", 7, 11]
    command = ["losa", "--config", folder / "run.json", "--sparsity", 0.5, "--output", folder / "out", *options]
    said = io.StringIO()
    with redirect_stdout(said):
        assert main([str(word) for word in command]) == 0
    assert "round 2: zeros 50.00% (49.00% to 51.00%), ranks" in said.getvalue()
    assert f"merge --base {folder / 'out' / 'model'} --adapter {folder / 'out' / 'run' / 'adapter'}" in said.getvalue()
    return folder / "out"


def test_layers_are_compared_by_cka_of_their_whole_inputs(tiny: Tiny) -> None:
    """Kornblith et al. 2019 in feature space, fp64, from a plain forward."""
    found = layer_similarity(tiny.model, None, tiny.train, SEQUENCES, LENGTH, torch.device("cpu"))
    tokens = read_sequences(tiny.train, read_tokenizer(tiny.model), SEQUENCES, LENGTH).sequences
    with torch.no_grad():
        states = load(Path(tiny.model))(input_ids=tokens, output_hidden_states=True).hidden_states[:-1]
    features = [state.flatten(1).double().numpy() for state in states]
    features = [rows - rows.mean(0) for rows in features]

    def hsic(x: np.ndarray, y: np.ndarray) -> float:
        return float(np.linalg.norm(x.T @ y) ** 2)

    for i, x in enumerate(features):
        for j, y in enumerate(features):
            expected = hsic(x, y) / (hsic(x, x) * hsic(y, y)) ** 0.5
            assert found.cka()[i, j].item() == pytest.approx(expected, abs=1e-5)
    assert found.alike()[0] == pytest.approx(found.cka()[0, 1:].sum().item())
    assert len(features) == len(found.layers) == 3 and len(set(found.weights)) == 1


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_zeros_are_chosen_of_the_merged_weights_and_the_adapter_is_taken_out(
    method: str, tiny: Tiny, one: Path, tmp_path: Path
) -> None:
    """The model merged first and then pruned is what base and adapter compute under the zeros."""
    merge_adapter(tiny.model, tiny.folder / "adapter", tmp_path / "merged", dtype="float32")
    prune(adapted(method, tmp_path, str(tmp_path / "merged"), tiny.train, None))
    merge_adapter(one / method, one / method / "adapter", tmp_path / "back", dtype="float32")
    before, base = tensors(Path(tiny.model)), tensors(one / method)
    expected, back = tensors(tmp_path / method), tensors(tmp_path / "back")
    changed = 0
    for name, value in base.items():
        assert torch.equal(value == 0, expected[name] == 0) and torch.equal(back[name] == 0, value == 0), name
        torch.testing.assert_close(back[name], expected[name], rtol=1e-4, atol=1e-5)
        kept = value != 0
        changed += int((value[kept] != before[name][kept]).sum())
        if name.endswith("_proj.weight"):
            rows = SHARES[int(name.split(".")[2])] * value.shape[1]
            assert abs((value == 0).sum(1).double().mean().item() - rows) <= 1, name
    # Wanda moves nothing but what it takes.
    assert (changed == 0) == (method == "wanda")
    errors = json.loads((one / method / "pruning.json").read_text())["errors"]
    assert len(errors) == 3 and all(error > 0 for error in errors.values())


def test_a_kept_weight_that_becomes_zero_is_not_lost(tiny: Tiny) -> None:
    """Where pruning has moved the merged weight to what the adapter gives; and a weight that was zero, under a plain
    adapter."""
    files = TensorFiles.of_model(Path(tiny.model))
    adapter = LayerAdapter(tiny.folder / "adapter", files)
    key = "model.layers.1.self_attn.q_proj.weight"
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        stored = files.read(key).to(dtype)
        stored[2, 3] = 0.0
        delta = adapter.adapter.add(key, torch.zeros_like(stored))
        pruned = adapter.merged(key, stored)
        pruned[0], pruned[1, :5] = delta[0], 0.0
        left = adapter.without(key, pruned, stored)
        assert left.dtype == dtype and torch.equal(left == 0, pruned == 0)
        assert torch.equal(left[2, 4:], stored[2, 4:]) and left[2, 3] == torch.finfo(dtype).tiny * pruned[2, 3].sign()
        computed = adapter.effective(key, left)
        torch.testing.assert_close(computed.float(), pruned, rtol=1e-2 if dtype != torch.float32 else 1e-6, atol=7e-5)


def test_adapters_at_other_ranks() -> None:
    """More computes the same to the bit; fewer is the best there is, by Eckart and Young; the scaling stays."""
    generator = torch.Generator().manual_seed(0)
    up, down = torch.randn(40, 6, generator=generator), torch.randn(6, 30, generator=generator)
    more = resized(up, down, 9, generator)
    assert [tuple(part.shape) for part in more] == [(40, 9), (9, 30)]
    assert torch.equal(more[0][:, :6], up) and torch.equal(more[1][:6], down) and not more[0][:, 6:].any()
    assert 0 < more[1][6:].abs().max() <= 30**-0.5
    fewer = resized(up, down, 4, generator)
    product = (up @ down).double()
    u, sizes, v = torch.linalg.svd(product, full_matrices=False)
    torch.testing.assert_close((fewer[0] @ fewer[1]).double(), u[:, :4] * sizes[:4] @ v[:4], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fewer[1].norm(dim=1), torch.full((4,), 3**-0.5))
    for rslora, power in ((False, 1.0), (True, 0.5)):
        found = patterns({"model.layers.3": 11}, {"r": 4, "lora_alpha": 10, "use_rslora": rslora})
        (alpha,) = found["alpha_pattern"].values()
        assert alpha / 11**power == pytest.approx(10 / 4**power)


def test_rounds_end_in_a_pruned_model_and_its_adapter(tiny: Tiny, whole: Path, tmp_path: Path) -> None:
    record = json.loads((whole / "losa.json").read_text())
    adapter = load_file(whole / "run" / "adapter" / "adapter_model.safetensors")
    assert sorted(path.name for path in whole.iterdir()) == ["losa.json", "model", "round-1", "run", "start"]
    for number, mean, steps in (("1", 0.4375, 2), ("2", 0.5, 2)):
        entry = record["rounds"][number]
        assert np.mean(entry["layer_sparsity"]) == pytest.approx(mean) and len(set(entry["layer_sparsity"])) > 1
        assert sum(entry["ranks"]) == round({"1": 7, "2": 11}[number] * 3)
        folder = whole / "run" if number == "2" else whole / "round-1" / "run"
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert len([row for row in rows if "loss" in row]) == steps
    ranks = record["rounds"]["2"]["ranks"]
    assert max(ranks) > 8
    for name, value in adapter.items():
        layer = int(name.split(".layers.")[1].split(".")[0])
        assert value.shape[0 if ".lora_A." in name else 1] == ranks[layer], name
        if ".lora_B." in name and ranks[layer] > 8:
            assert value[:, 8:].abs().max() > 0, "what is beyond rank 8 was trained"
    merge_adapter(whole / "model", whole / "run" / "adapter", tmp_path / "merged", dtype="float32")
    base, merged = tensors(whole / "model"), tensors(tmp_path / "merged")
    for name, value in base.items():
        assert not merged[name][value == 0].any(), name
        if name.endswith("_proj.weight"):
            assert (value == 0).double().mean() > 0.4 and not torch.equal(merged[name], value), name
    trained = record["rounds"]["2"]["trained"]
    assert trained["eval_loss"] < trained["eval_loss_start"]


class StopError(Exception):
    pass


def test_it_goes_on_in_the_round_that_was_not_finished(tiny: Tiny, whole: Path, tmp_path: Path) -> None:
    trained: list[str] = []

    def train(stops: bool) -> Any:
        def one(settings: RunConfig) -> dict[str, Any]:
            trained.append(settings.model.name_or_path)
            if stops and len(trained) == 2:
                raise StopError
            return run(settings)

        return one

    words = asked(config(tiny), str(tmp_path / "out"))
    with pytest.raises(StopError):
        losa(words, train(stops=True))
    assert not (tmp_path / "out" / "round-1" / "model").exists(), "a pruned model that nobody needs"
    with pytest.raises(ValueError, match=r"was begun with sparsity 0\.5, not 0\.6"):
        losa(replace(words, sparsity=0.6), run)
    record = losa(words, train(stops=False))
    assert [Path(path).parent.name for path in trained] == ["round-1", "out", "out"]
    for name in ("run/adapter", "model"):
        expected, found = _files(whole / name), _files(tmp_path / "out" / name)
        assert expected.keys() == found.keys() and all(
            torch.equal(found[key], value) for key, value in expected.items()
        )
    assert record["rounds"] == json.loads((whole / "losa.json").read_text())["rounds"]
    with pytest.raises(FileExistsError, match="holds all 2 rounds"):
        losa(words, run)


def _files(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def test_two_ranks_choose_the_same(tiny: Tiny, one: Path, whole: Path, tmp_path: Path) -> None:
    """Gram matrices and pruned files to the bit; FSDP2's rounds as one process's, and nothing of a round stays in memory."""
    (grams, record, alive), (none, other, _) = run_ranks(
        f"{everything.__module__}:everything", 2, *words(tiny, tmp_path), config(tiny, "fsdp2")
    )
    expected = torch.load(one / "grams.pt")
    assert none == [] and len(grams) == 3 and all(torch.equal(gram, known) for gram, known in zip(grams, expected))
    mine, theirs = tensors(tmp_path / "sparsegpt"), tensors(one / "sparsegpt")
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    errors = [json.loads((folder / "sparsegpt" / "pruning.json").read_text())["errors"] for folder in (tmp_path, one)]
    assert errors[0] == errors[1]
    assert record == other
    known = json.loads((whole / "losa.json").read_text())["rounds"]
    for key in ("layer_sparsity", "ranks", "errors"):
        assert record["rounds"]["1"][key] == known["1"][key]
    assert alive[1] <= alive[0]
    last, same = (entry["trained"]["eval_loss"] for entry in (record["rounds"]["2"], known["2"]))
    assert last == pytest.approx(same, abs=2e-3)


@pytest.mark.parametrize(
    ("options", "lora", "told"),
    [
        (["--method", "obc"], {}, "--method is 'obc'"),
        (["--rounds", "0"], {}, "--rounds is 0"),
        (["--sparsity", "1.5"], {}, "sparsity is 1.5"),
        (["--similar", "1"], {}, "--similar is 1: allowed: integers from 2"),
        (["--ranks", "6", "20"], {}, "--ranks is (6.0, 20.0): allowed: numbers from 1 to 16"),
        (["--last-share", "0"], {}, "--last-share is 0.0"),
        ([], {"rank_pattern": {"q_proj": 3}}, "'lora.rank_pattern' with LoSA"),
        ([], {"init_from": "somewhere"}, "'lora.init_from' with LoSA"),
    ],
)  # fmt: skip
def test_bad_input_is_named(
    options: list[str], lora: dict[str, Any], told: str, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(tiny)
    settings["lora"] |= lora
    (tmp_path / "run.json").write_text(json.dumps(settings))
    command = ["losa", "--config", str(tmp_path / "run.json"), "--sparsity", "0.5", "--output", str(tmp_path / "out")]
    assert main([*command, *options]) == 2
    assert told in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[0.5, 0.5]", "2 layers are given a sparsity"),
        ("[0.5, 0.5, 1.0]", "a layer's sparsity is 1.0"),
        ('{"0": 0.5}', "expected a list with a number for each layer"),
        ("[0.5, ", "is not JSON"),
    ],
)
def test_bad_layer_sparsities_are_named(
    text: str, told: str, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "shares.json").write_text(text)
    command = [
        "prune",
        "--model",
        tiny.model,
        "--method",
        "magnitude",
        "--layer-sparsity",
        str(tmp_path / "shares.json"),
    ]
    assert main([*command, "--output", str(tmp_path / "out")]) == 2
    assert told in capsys.readouterr().err and not (tmp_path / "out").exists()
