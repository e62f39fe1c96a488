"""Every kind of folder that sentence-transformers' CrossEncoder scores: the engine gives the same logits."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
from sentence_transformers import CrossEncoder

from benchmarks.card import INSTRUCTION, PREFIX, SUFFIX
from tests.references.checkpoints import FORMS, GENERIC_TEMPLATE, Form, classifier, original
from tests.references.original import ORIGINAL_TEMPLATE, QWEN_VOCABULARY
from tests.references.scores import DOCUMENTS, INSTRUCTIONS, QUERIES, Engine, assert_equal, load, predict

QUERY, CHINESE = QUERIES["a question"], QUERIES["Chinese"]


class Loaded(NamedTuple):
    """A folder as both sides load it."""

    form: Form
    reference: CrossEncoder
    engine: Engine


@pytest.fixture(scope="module", params=FORMS, ids=lambda form: form.name)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = request.param.build(tmp_path_factory.mktemp("form") / "model")
    return Loaded(request.param, load(folder), Engine(folder))


@pytest.mark.parametrize("query", QUERIES.values(), ids=QUERIES)
def test_the_default_instruction(loaded: Loaded, query: str) -> None:
    assert_equal(loaded.engine.logits(query, DOCUMENTS), predict(loaded.reference, query, DOCUMENTS))


@pytest.mark.parametrize("instruction", INSTRUCTIONS.values(), ids=INSTRUCTIONS)
def test_an_instruction_of_the_request(loaded: Loaded, instruction: str) -> None:
    assert loaded.engine.scorer.info.reads_instruction == loaded.form.instructions
    reference = predict(loaded.reference, QUERY, DOCUMENTS, instruction)
    assert_equal(loaded.engine.logits(QUERY, DOCUMENTS, instruction), reference)


def test_a_document_alone(loaded: Loaded) -> None:
    alone = [loaded.engine.logits(CHINESE, [document])[0] for document in DOCUMENTS]
    assert_equal(alone, predict(loaded.reference, CHINESE, DOCUMENTS))


@pytest.mark.parametrize("name", ["original layout", "zerank", "mxbai"])
def test_a_document_that_does_not_fit(tmp_path: Path, name: str) -> None:
    """Both sides cut the end of the document and keep what follows it in the template."""
    folder = next(form for form in FORMS if form.name == name).build(tmp_path / "model")
    long = DOCUMENTS[-4:]
    limit = len(load(folder).preprocess([(QUERY, long[0])])["input_ids"][0])
    reference = predict(load(folder, model_max_length=limit), QUERY, long)
    assert_equal(Engine(folder, max_seq_length=limit).logits(QUERY, long), reference)


@pytest.mark.skipif(not QWEN_VOCABULARY.is_dir(), reason="Qwen3's tokenizer is missing: run `make tokenizer`")
def test_the_original_repository_with_its_own_vocabulary(tmp_path: Path) -> None:
    folder = original(tmp_path / "model")
    reference, engine = load(folder), Engine(folder)
    for query, instruction in ((QUERY, None), (CHINESE, INSTRUCTIONS["a sentence"])):
        assert_equal(engine.logits(query, DOCUMENTS, instruction), predict(reference, query, DOCUMENTS, instruction))


@pytest.mark.parametrize("template", [None, GENERIC_TEMPLATE], ids=["no template", "a generic template"])
def test_a_classifier_whose_files_say_nothing_of_the_prompt_gets_the_card_s(
    tmp_path: Path, template: str | None
) -> None:
    folder = classifier(tmp_path / "model", template=template)
    reference = load(folder, chat_template=ORIGINAL_TEMPLATE)
    assert_equal(Engine(folder).logits(CHINESE, DOCUMENTS), predict(reference, CHINESE, DOCUMENTS))


def test_a_classifier_as_its_card_says_with_the_prompt_written_into_the_pair(tmp_path: Path) -> None:
    folder = classifier(tmp_path / "model")
    query = f"{PREFIX}<Instruct>: {INSTRUCTION}\n<Query>: {QUERY}\n"
    reference = predict(load(folder), query, [f"<Document>: {document}{SUFFIX}" for document in DOCUMENTS])
    assert_equal(Engine(folder).logits(QUERY, DOCUMENTS), reference)


def test_two_labels_are_the_second_minus_the_first(tmp_path: Path) -> None:
    folder = classifier(tmp_path / "model", labels=2, template=ORIGINAL_TEMPLATE)
    reference = predict(load(folder), QUERY, DOCUMENTS)
    assert_equal(Engine(folder).logits(QUERY, DOCUMENTS), [logits[1] - logits[0] for logits in reference])
