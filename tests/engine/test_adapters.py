"""LoRA adapters from the folder to the scores: found with their base, merged, and described."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

from benchmarks.card import INSTRUCTION, Card
from reranker import ModelLoadError, Scorer
from reranker.engine.checkpoint.locate import locate
from reranker.engine.checkpoint.tokenizer import load_tokenizer
from reranker.types import RerankRequest, Slice
from tests.cli.command import cli
from tests.engine.adapters import PREFIX, factors, merged_by_hand, write_adapter
from tests.engine.checkpoints import (
    EMBEDDING,
    HEAD,
    WIDTH,
    ZERANK_TEMPLATE,
    as_type,
    both,
    score_head,
    sentence_transformers,
    settings,
    small_model,
    write,
)
from tests.engine.quantization import FORMS as QUANTIZED
from tests.engine.quantization import plain_twin, quantize
from tests.engine.rendered import Rendered
from tests.engine.test_forms import CARD

QUERY = "how to compress files"
DOCUMENTS = ["gzip compresses files", "x", "gzip 可以压缩文件 " * 20]
TARGETS = ("q_proj", "v_proj", "down_proj")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    made = {name: small_model(root / name, layers=2, tied=name != "untied") for name in ("tied", "untied", "bfloat16")}
    both(as_type(torch.bfloat16), settings(dtype="bfloat16"))(made["bfloat16"])
    return made


@pytest.fixture(scope="module")
def base(bases: dict[str, Path]) -> Path:
    return bases["tied"]


@pytest.fixture(scope="module")
def expected(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The logits of the tied base with an adapter of TARGETS."""
    return card(merged_by_hand(base, factors(base, TARGETS), tmp_path_factory.mktemp("expected") / "merged"))


def card(folder: Path) -> list[float]:
    """Logits of plain transformers, one pair at a time."""
    reference = Card(folder)
    return [reference.logit(QUERY, document) for document in DOCUMENTS]


def logits(folder: Path | str, precision: str = "float32") -> list[float]:
    scorer = Scorer.load(folder, device="cpu", precision=precision)
    request = scorer.encode(RerankRequest(QUERY, DOCUMENTS))
    return scorer.score(scorer.pack([Slice(request, 0, len(DOCUMENTS))]))


def refused(folder: Path | str) -> str:
    with pytest.raises(ModelLoadError) as caught:
        Scorer.load(folder, device="cpu", precision="float32")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rows(base: Path, name: str = EMBEDDING) -> Tensor:
    """A trained copy of a matrix of the base."""
    random = torch.Generator().manual_seed(2)
    weight = load_file(base / "model.safetensors")[name].float()
    return weight + torch.randn(weight.shape, generator=random) * 0.1


FORMS: dict[str, Callable[[Path], dict[str, Tensor]]] = {
    "every projection": factors,
    "attention alone": lambda base: factors(base, ("q_proj", "v_proj")),
    "a saved head": lambda base: factors(base, TARGETS) | {PREFIX + HEAD: rows(base)},
    "saved embeddings": lambda base: factors(base, TARGETS) | {PREFIX + EMBEDDING: rows(base)},
    "saved norms": lambda base: factors(base, TARGETS) | {f"{PREFIX}model.norm.weight": torch.full((WIDTH,), 0.5)},
    "factors of the head": lambda base: {
        f"{PREFIX}lm_head.lora_A.weight": torch.ones(4, WIDTH) * 0.1,
        f"{PREFIX}lm_head.lora_B.weight": rows(base)[:, :4].contiguous(),
    },
}


@pytest.mark.parametrize(
    ("kind", "form"),
    [*(("tied", form) for form in FORMS), ("untied", "factors of the head"), ("bfloat16", "every projection")],
)
def test_the_scores_are_those_of_the_merged_model(bases: dict[str, Path], tmp_path: Path, kind: str, form: str) -> None:
    """Of tied weights an adapter of the head changes the head alone, and one of the embedding only the embedding."""
    base, tensors = bases[kind], FORMS[form](bases[kind])
    adapter = write_adapter(tmp_path / "adapter", tensors, base=str(base))
    merged = card(merged_by_hand(base, tensors, tmp_path / "merged"))
    assert logits(adapter) == pytest.approx(merged, abs=1e-5)
    assert max(abs(a - b) for a, b in zip(merged, card(base), strict=True)) > 0.01


def test_an_adapter_is_added_to_the_widened_weights_of_a_quantised_base(base: Path, tmp_path: Path) -> None:
    """In int8 the projections are then rounded anew, also those that the adapter leaves as they are."""
    quantized = quantize(base, tmp_path / "base", next(form for form in QUANTIZED if form.name == "W8A8"))
    tensors = factors(base, TARGETS)
    adapter = write_adapter(tmp_path / "adapter", tensors, base=str(quantized))
    merged = merged_by_hand(plain_twin(quantized), tensors, tmp_path / "merged")
    assert logits(adapter) == pytest.approx(card(merged), abs=1e-5)
    assert logits(adapter, "int8") == pytest.approx(logits(merged, "int8"), abs=1e-5)


@pytest.mark.parametrize("labels", [1, 2])
def test_a_score_head_of_the_adapter_replaces_the_words_of_its_base(base: Path, tmp_path: Path, labels: int) -> None:
    head = torch.randn(labels, WIDTH, generator=torch.Generator().manual_seed(3)) / 10
    tensors = factors(base, TARGETS)
    own = Path(shutil.copytree(base, tmp_path / "base"))
    sentence_transformers()(own)  # names yes and no
    trained = {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]}
    adapter = write_adapter(tmp_path / "a", tensors | {f"{PREFIX}score.weight": head}, base=str(own), **trained)
    merged = merged_by_hand(base, tensors, tmp_path / "merged")
    score_head(head)(merged)
    reference = Rendered(merged, CARD)
    expected = [reference.logit(QUERY, document, INSTRUCTION) for document in DOCUMENTS]
    assert logits(adapter) == pytest.approx(expected, abs=1e-5)
    own_tokenizer(base, adapter)
    sentence_transformers()(adapter)
    assert "has a score head and names words to score" in refused(adapter)


def test_words_and_prompt_in_the_folder_of_the_adapter_come_before_those_of_the_base(
    base: Path, tmp_path: Path
) -> None:
    """As sentence-transformers saves a cross-encoder with an adapter."""
    tensors = factors(base, TARGETS)
    own = Path(shutil.copytree(base, tmp_path / "base"))
    sentence_transformers()(own)
    adapter = write_adapter(tmp_path / "a", tensors, base=str(own))
    merged = merged_by_hand(base, tensors, tmp_path / "merged")
    for folder in (adapter, merged):
        own_tokenizer(base, folder)
        sentence_transformers(true=17, false=18, template=ZERANK_TEMPLATE)(folder)
    reference = Rendered(merged)
    expected = [reference.logit(QUERY, document) for document in DOCUMENTS]
    assert logits(adapter) == pytest.approx(expected, abs=1e-5)


def test_an_adapter_for_words_is_not_added_to_a_score_head(base: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(base, tmp_path / "base"))
    score_head(torch.ones(1, WIDTH))(own)
    message = refused(write_adapter(tmp_path / "a", factors(base, TARGETS), base=str(own)))
    assert "is for CAUSAL_LM, and its base is a Qwen3ForSequenceClassification: use the base it was" in message


def test_the_files_may_lie_in_one_folder(base: Path, expected: list[float], tmp_path: Path) -> None:
    """Also where adapter_config.json names another machine's folder."""
    folder = Path(shutil.copytree(base, tmp_path / "model"))
    write_adapter(folder, factors(base, TARGETS), base="/home/trainer/base")
    assert logits(folder) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", ["{base}", "../base", "base", "models/../base"])
def test_the_base_is_a_folder(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Absolute, or relative to the folder of the adapter or to the working directory."""
    (tmp_path / "base").symlink_to(base)
    (tmp_path / "models").mkdir()
    write_adapter(tmp_path / "adapter", factors(base, TARGETS), base=name.format(base=base))
    monkeypatch.chdir(tmp_path)
    located = locate("adapter")
    assert located.path.resolve() == base
    assert located.adapter is not None


def cached(root: Path, name: str, folder: Path, commit: str = "aaaa") -> None:
    """Put a folder into the hub's cache."""
    repository = root / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(commit)


def test_adapter_and_base_are_found_on_the_hub(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "hub"
    adapter = write_adapter(
        tmp_path / "adapter", factors(base, TARGETS), base="Qwen/Qwen3-Reranker-0.6B", revision="v1"
    )
    cached(cache, "someone/reranker-lora", adapter)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    message = refused("someone/reranker-lora")
    assert "the base of the LoRA adapter in" in message
    assert "cannot download Qwen/Qwen3-Reranker-0.6B" in message
    cached(cache, "Qwen/Qwen3-Reranker-0.6B", base)
    assert "cannot download" in refused("someone/reranker-lora")  # the cache has main, the adapter names v1
    (cache / "models--Qwen--Qwen3-Reranker-0.6B" / "refs" / "v1").write_text("aaaa")
    located = locate("someone/reranker-lora")
    assert [folder.parts[-3] for folder in located.folders] == [
        "models--someone--reranker-lora",
        "models--Qwen--Qwen3-Reranker-0.6B",
    ]


def test_the_base_is_a_folder_of_the_hubs_cache(base: Path, tmp_path: Path) -> None:
    cached(tmp_path, "Qwen/Qwen3-Reranker-0.6B", base)
    folder = tmp_path / "models--Qwen--Qwen3-Reranker-0.6B"
    adapter = write_adapter(tmp_path / "adapter", factors(base, TARGETS), base=str(folder), revision="aaaa")
    assert locate(str(adapter)).path == folder / "snapshots" / "aaaa"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "names none (base_model_name_or_path): write its folder or hub name there"),
        ("/home/trainer/models/base", "names /home/trainer/models/base, which does not exist here: write its folder"),
        (".", "it is a LoRA adapter too"),
        ("empty", "holds no config.json"),
    ],
)
def test_a_base_that_cannot_be_used_is_named(base: Path, tmp_path: Path, name: str, words: str) -> None:
    adapter = write_adapter(tmp_path / "adapter", factors(base, TARGETS), base=name)
    (adapter / "empty").mkdir()
    message = refused(adapter)
    assert f"the base of the LoRA adapter in {adapter} cannot be used: " in message
    assert words in message


@pytest.mark.parametrize("beside", [True, False])
def test_a_quantised_base_is_refused_with_the_way_out(base: Path, tmp_path: Path, beside: bool) -> None:
    quantized = Path(shutil.copytree(base, tmp_path / "base"))
    settings(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})(quantized)
    adapter = write_adapter(quantized if beside else tmp_path / "adapter", factors(base), base=str(quantized))
    message = refused(adapter)
    assert message.startswith(f"the base of the LoRA adapter in {adapter} cannot be used: ")
    assert "(bitsandbytes), which is not read" in message
    assert ("put the files of the adapter beside" if beside else "unquantised original into base_model") in message


def test_an_adapter_of_another_model_is_refused(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", factors(base) | {f"{PREFIX}score.weight": torch.ones(1, WIDTH)})
    shutil.copytree(base, adapter, dirs_exist_ok=True)
    assert "score.weight in" in (message := refused(adapter))
    assert "matches no weight of the base" in message


def test_an_untrained_adapter_is_merged_with_a_warning(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = {name: tensor * ("lora_A" in name) for name, tensor in factors(base).items()}
    adapter = write_adapter(tmp_path / "adapter", tensors, base=str(base))
    with caplog.at_level(logging.WARNING):
        Scorer.load(adapter, device="cpu")
    assert f"the LoRA adapter in {adapter} changes no projection" in caplog.text


def test_an_adapter_in_a_subfolder_is_not_applied(base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = Path(shutil.copytree(base, tmp_path / "model"))
    inner = write_adapter(folder / "checkpoint-500", factors(base, TARGETS), base="..")
    with caplog.at_level(logging.WARNING):
        assert locate(str(folder)).adapter is None
    assert f"adapter in {inner} is not applied: to serve it, set MODEL_NAME_OR_PATH to it" in caplog.text
    caplog.clear()
    assert locate(str(inner)).path == folder
    assert not caplog.records


def test_the_folder_above_adapters_names_them(base: Path, tmp_path: Path) -> None:
    inner = write_adapter(tmp_path / "checkpoint-500", factors(base, TARGETS))
    assert f"but {inner} does: set MODEL_NAME_OR_PATH to that folder" in refused(tmp_path)


def test_the_log_and_check_describe_the_adapter(base: Path, tmp_path: Path) -> None:
    tensors = factors(base, TARGETS) | {PREFIX + HEAD: rows(base)}
    adapter = write_adapter(tmp_path / "adapter", tensors, base=str(base))
    done = cli("check", "--model", adapter, "--verbose", cwd=tmp_path)
    described = f"{adapter} (rank 4, alpha 8, 6 projections, saved lm_head.weight) into {base}"
    assert json.loads(done.stdout)["adapter"] == described
    assert f"merging the LoRA adapter {described}" in done.stderr
    assert "changes no projection" not in done.stderr


def test_a_weight_that_is_not_finite_is_named(base: Path, tmp_path: Path) -> None:
    tensors = factors(base, TARGETS)
    name = next(iter(tensors))
    adapter = write_adapter(tmp_path / "adapter", tensors | {name: tensors[name] * math.nan}, base=str(base))
    assert f"damaged: {name} in {adapter / 'adapter_model.safetensors'} is not finite" in refused(adapter)


def test_the_files_are_those_of_adapter_and_base(base: Path, tmp_path: Path) -> None:
    """By them a resumed batch knows its model again."""
    adapter = write_adapter(tmp_path / "adapter", factors(base, TARGETS), base=str(base))
    both_files = ["adapter_config.json", "adapter_model.safetensors"]
    assert [file.name for file in locate(str(adapter)).files[:2]] == both_files
    assert locate(str(adapter)).files[2:] == locate(str(base)).files


def own_tokenizer(base: Path, adapter: Path, *words: str) -> None:
    """Save the base's tokenizer in the folder of the adapter, with more words."""
    tokenizer = AutoTokenizer.from_pretrained(str(base))
    tokenizer.add_tokens(list(words))
    tokenizer.save_pretrained(str(adapter))


def test_the_adapters_own_tokenizer_and_template_are_read_before_the_bases(base: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(base, tmp_path / "base"))
    write("chat_template.jinja", "the base's")(copy)
    adapter = write_adapter(tmp_path / "adapter", factors(base, TARGETS))

    def read() -> tuple[Path, object]:
        tokenizer = load_tokenizer(adapter, copy)
        return Path(tokenizer.name_or_path), tokenizer.chat_template

    assert read() == (copy, "the base's")
    write("chat_template.jinja", "the adapter's")(adapter)
    assert read() == (copy, "the adapter's")
    (adapter / "chat_template.jinja").unlink()
    own_tokenizer(base, adapter)
    assert read() == (adapter, "the base's")
    write("chat_template.jinja", "the adapter's")(adapter)
    assert read() == (adapter, "the adapter's")


def test_a_tokenizer_with_more_words_than_the_base_has_rows_is_refused(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", factors(base, TARGETS), base=str(base))
    own_tokenizer(base, adapter, "gzip")
    message = refused(adapter)
    assert f"the tokenizer in {adapter} has the token id 1026, but config.json has a vocab_size of 1026" in message
