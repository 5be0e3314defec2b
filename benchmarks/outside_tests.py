"""PEFT's and TRL's own tests with every PEFT model made sparse-capable: which fail then, and not as they are?

    python benchmarks/outside_tests.py PEFT_CHECKOUT/tests/test_decoder_models.py -o addopts= -k "LoraConfig and Llama"
    python benchmarks/outside_tests.py TRL_CHECKOUT/tests/test_dpo_trainer.py -k peft

The tests are run three times: plain; with ``apply_sparselora`` and ``enabled: false`` on every model that PEFT makes; and
with sparsity 0 in every group. Models that are not supported are left alone. As their users do, every Trainer of a sparse
model gets a SparseLoRACallback. The tests loop over ``named_parameters`` and take every name that the plain model does not
have for one that training must change; they are given the names that the model's state dict has, in which a frozen matrix
is its family's and estimators, frozen as well, are not. The models that the tests load by name are
made here, tiny and random, in a folder that looks like the hub's cache, and so are the rows of the data set that TRL's
tests load, so that no network is needed; a test of another model fails in all three and does not count. This file is
runner and pytest plugin in one.
"""

from __future__ import annotations

import argparse
import functools
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

MODES = {"plain": None, "enabled false": {"enabled": False}, "sparsity 0": {}}
ALL = {group: {"0-1": 0.0} for group in ("ffn", "qk", "vo")}
MODELS = {
    "trl-internal-testing/tiny-random-LlamaForCausalLM": "llama",
    "hf-internal-testing/tiny-random-MistralForCausalLM": "mistral",
    "peft-internal-testing/tiny-dummy-qwen2": "qwen2",
    "trl-internal-testing/tiny-Qwen3ForCausalLM": "qwen3",
    "trl-internal-testing/tiny-LlamaForCausalLM-3.2": "llama",
    "trl-internal-testing/tiny-MistralForCausalLM-0.2": "mistral",
    "trl-internal-testing/tiny-Qwen2ForCausalLM-2.5": "qwen2",
    "trl-internal-testing/tiny-Qwen2ForSequenceClassification-2.5": "qwen2",
}
DATA = "trl-internal-testing/zen"
CHAT = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {{ eos_token }} {% endfor %}"
_MODE, _COUNTS = "OUTSIDE_TESTS_MODE", "OUTSIDE_TESTS_COUNTS"


def make_models(hub: Path) -> None:
    """Tiny random models and a tokenizer under their names, laid out as the hub's cache."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        PreTrainedTokenizerFast,
    )

    # By bytes, without merges: whatever class of tokenizer Transformers takes for a family, it reads this vocabulary.
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    vocabulary = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    by_bytes = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    by_bytes.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=by_bytes, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = CHAT
    torch.manual_seed(0)
    for name, family in MODELS.items():
        root = hub / f"models--{name.replace('/', '--')}"
        (root / "refs").mkdir(parents=True)
        (root / "refs" / "main").write_text("0" * 40)
        config = AutoConfig.for_model(
            family,
            vocab_size=1000,
            hidden_size=16,
            intermediate_size=44,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=4,
            max_position_embeddings=512,
            initializer_range=0.3,  # So that every adapter has a gradient that an optimizer step can be seen of.
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        folder = root / "snapshots" / ("0" * 40)
        if "Classification" in name:
            config.num_labels = 1
            AutoModelForSequenceClassification.from_config(config, trust_remote_code=False).save_pretrained(folder)
        else:
            AutoModelForCausalLM.from_config(config, trust_remote_code=False).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def data_set(name: str, count: int) -> list[dict[str, Any]]:
    """Rows of one configuration of TRL's test data."""
    style, _, kind = name.partition("_")

    def say(role: str, text: str) -> Any:
        return text if style == "standard" else [{"role": role, "content": text}]

    rows = []
    for number in range(count):
        prompt, good, bad = (" ".join(f"w{4 + (number * 7 + i * k) % 90}" for i in range(6)) for k in (1, 3, 5))
        asked, told, wrong = say("user", prompt), say("assistant", f" {good}"), say("assistant", f" {bad}")
        rows.append(
            {
                "language_modeling": {"text" if style == "standard" else "messages": asked + told},
                "prompt_only": {"prompt": asked},
                "prompt_completion": {"prompt": asked, "completion": told},
                "preference": {"prompt": asked, "chosen": told, "rejected": wrong},
                "implicit_prompt_preference": {"chosen": asked + told, "rejected": asked + wrong},
                "unpaired_preference": {"prompt": asked, "completion": told, "label": number % 2 == 0},
            }[kind]
        )
    return rows


def local_data() -> None:
    """Let ``datasets.load_dataset`` give these rows where TRL's tests ask for theirs."""
    import datasets

    load = datasets.load_dataset

    def loaded(path: str, name: str = "", *args: Any, split: str | None = None, **kwargs: Any) -> Any:
        if path != DATA:
            return load(path, name, *args, split=split, **kwargs)
        both = {part: datasets.Dataset.from_list(data_set(name, count)) for part, count in (("train", 17), ("test", 2))}
        return datasets.DatasetDict(both) if split is None else both[split.partition("[")[0]]

    datasets.load_dataset = loaded


def pytest_configure(config: Any) -> None:
    """As a plugin: every PEFT model is made sparse once it is made, and counted."""
    local_data()
    if find_spec("diffusers") is None:  # PEFT's helpers import one name of it, for other tests.
        module: Any = ModuleType("diffusers")
        module.__spec__, module.StableDiffusionPipeline = ModuleSpec("diffusers", None), type("Pipeline", (), {})
        sys.modules["diffusers"] = module
    mode = MODES[os.environ[_MODE]]
    if mode is None:
        return
    from peft import PeftModel
    from transformers import Trainer

    from sparselora_dist import SparseLoRACallback, SparseLoRAConfig, apply_sparselora
    from sparselora_dist.apply import find_state

    settings = SparseLoRAConfig.from_dict({"layers": ALL, **mode})
    made = PeftModel.__init__

    @functools.wraps(made)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        try:
            apply_sparselora(self, settings)
            name_as_the_family(self)
            word = "sparse"
        except (ValueError, AttributeError) as error:
            word = f"left alone: {type(error).__name__}: {str(error)[:120]}"
        with open(os.environ[_COUNTS], "a") as file:
            file.write(word + "\n")

    PeftModel.__init__ = init
    built = Trainer.__init__

    @functools.wraps(built)
    def build(self: Any, *args: Any, **kwargs: Any) -> None:
        built(self, *args, **kwargs)
        if find_state(self.model) is not None:
            self.add_callback(SparseLoRACallback())

    Trainer.__init__ = build


def name_as_the_family(model: Any) -> None:
    """This model's ``named_parameters`` and ``get_parameter`` by the names of its state dict; frozen matrices as stored."""
    from sparselora_dist.codecs.linear import FrozenLinear
    from sparselora_dist.layers.estimator import AttentionEstimator, FFNEstimator

    named = model.named_parameters

    def named_parameters(*args: Any, **kwargs: Any) -> Iterator[tuple[str, Any]]:
        modules = dict(model.named_modules())
        for name, parameter in named(*args, **kwargs):
            parent, _, own = name.rpartition(".")
            module = modules.get(parent)
            if isinstance(module, FrozenLinear) and own == "rows":
                name = f"{parent}.weight"
            if not isinstance(module, (AttentionEstimator, FFNEstimator)):
                yield name, parameter

    model.named_parameters = named_parameters
    model.get_parameter = lambda name: dict(named_parameters())[name]


def run(mode: str, arguments: list[str], hub: Path, folder: Path) -> tuple[dict[str, str], Counter[str]]:
    """Outcome of every test by its name, and how many models were made sparse."""
    report, counts = folder / f"{mode}.xml", folder / f"{mode}.txt"
    counts.touch()
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(hub), "SPARSELORA_CACHE": str(folder / "factors")}
    with open(folder / f"{mode}.log", "w") as log:
        subprocess.run(
            [
                sys.executable,
                "-m",
                "pytest",
                "-q",
                "-p",
                Path(__file__).stem,
                f"--junitxml={report}",
                "--tb=line",
                *arguments,
            ],
            env=os.environ | offline | {"PYTHONPATH": path, _MODE: mode, _COUNTS: str(counts)},
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
        )
    outcomes = {}
    for case in ET.parse(report).iter("testcase"):
        kinds = [child for child in case if child.tag in ("failure", "error", "skipped")]
        word = f"{kinds[0].tag}: {(kinds[0].get('message') or '')[:160]}" if kinds else "passed"
        outcomes[f"{case.get('classname')}::{case.get('name')}"] = word
    return outcomes, Counter(line for line in counts.read_text().splitlines())


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--logs", type=Path, help="keep the logs and reports in this folder")
    options, arguments = parser.parse_known_args()
    folder = options.logs or Path(tempfile.mkdtemp(prefix="outside-tests-"))
    folder.mkdir(parents=True, exist_ok=True)
    hub = folder / "hub"
    if not hub.exists():
        make_models(hub)
    results = {mode: run(mode, arguments, hub, folder) for mode in MODES}
    plain = results["plain"][0]
    print(
        "| run | passed | failed | skipped | models made sparse | left alone | fails only here |\n"
        "|---|---|---|---|---|---|---|"
    )
    new: list[str] = []
    for mode, (outcomes, made) in results.items():
        words = Counter(word.split(":")[0] for word in outcomes.values())
        ours = [name for name, word in outcomes.items() if word[0] in "fe" and plain.get(name, "passed")[0] not in "fe"]
        new += [f"{mode}: {name}: {outcomes[name]}" for name in ours]
        cells = [words["passed"], words["failure"] + words["error"], words["skipped"], made["sparse"]]
        cells += [made.total() - made["sparse"], len(ours)]
        print(f"| {mode} | {' | '.join(map(str, cells))} |")
    print("\n".join(new))
    return 1 if new else 0


if __name__ == "__main__":
    sys.exit(main())
