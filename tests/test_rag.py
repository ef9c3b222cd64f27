"""The RAG lab: its corpus and question set, the parts of its pipeline, and its command."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest

from labs.rag import __main__ as command
from labs.rag import experiments, index
from labs.rag.corpus import SHORTEST, Document, documents, fingerprint
from labs.rag.evaluation import Query, bootstrap, first_hit, ndcg, queries, scores
from labs.rag.pipeline import FEATURES, SIGNALS, TUNED, Pipeline, check_question, fuse


@pytest.fixture(scope="module")
def pipeline():
    index.build(lambda line: None)  # does nothing new where `make test` has built it
    return Pipeline(index.load())


# -- corpus and questions -------------------------------------------------------------------------------------------


def test_the_corpus_is_large_and_each_name_and_text_is_there_once():
    corpus = documents()
    assert len(corpus) >= 3000
    assert len({d.name for d in corpus}) == len({d.body for d in corpus}) == len(corpus)
    assert all(len(d.body) >= SHORTEST for d in corpus)
    assert {d.package for d in corpus} == {"torch", "transformers"}
    assert [d.name for d in corpus] == sorted(d.name for d in corpus)


def test_the_corpus_is_the_same_in_another_process_whatever_the_hash_seed():
    code = "import hashlib; from labs.rag.corpus import documents; print(hashlib.sha256(''.join(d.text for d in documents()).encode()).hexdigest())"
    made = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(made) == 1
    assert " at 0x" not in "".join(d.text for d in documents())


def test_a_class_keeps_its_own_docstring():
    names = {d.name: d for d in documents()}
    assert names["torch.nn.Linear"].body.startswith("Applies an affine linear transformation")
    assert "max_norm" in names["torch.nn.utils.clip_grad_norm_"].signature


def test_the_questions_are_as_many_as_promised_and_half_of_each_kind_is_test():
    asked = queries()
    answerable = [q for q in asked if q.answers]
    assert len(answerable) >= 160 and len(asked) - len(answerable) >= 60
    assert sum(q.zh is not None for q in answerable) >= 60
    assert sum(q.kind == "near" for q in asked if not q.answers) >= 20  # they look as if they could be answered
    assert len({q.id for q in asked}) == len({q.query for q in asked}) == len(asked)
    for kind in {q.kind for q in asked}:
        test = [q.split == "test" for q in asked if q.kind == kind]
        assert abs(sum(test) - len(test) / 2) <= 1


def test_every_answer_is_a_document_and_says_what_is_expected():
    names = {d.name: d for d in documents()}
    for q in queries():
        assert q.answers <= names.keys(), q.id
        assert bool(q.answers) == bool(q.expect), q.id
        for text in q.expect:
            assert any(text.lower() in names[a].text.lower() for a in q.answers), (q.id, text)


# -- parts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "overlap"), [(50, 0), (50, 20), (200, 40), (10_000, 0)])
def test_chunks_are_short_overlap_and_lose_nothing(size, overlap):
    body = max(documents()[:300], key=lambda d: len(d.body)).body[:5000]
    pieces = index.chunks(body, size, overlap)
    assert all(0 < len(p) <= size for p in pieces)
    written, long = set(body.split()), {w for w in body.split() if len(w) > size / 2}  # these are cut
    kept = set(" ".join(pieces).split())
    assert written - long <= kept
    assert all(any(word in whole for whole in long) for word in kept - written)
    assert (len(pieces) == 1) == (len(body) <= size)


def test_an_overlap_of_half_a_chunk_is_refused():
    with pytest.raises(ValueError, match="less than half"):
        index.chunks("some text", 100, 50)


def test_an_identifier_is_found_whole_and_in_its_parts():
    assert index.words("clip_grad_norm_ of DataLoader") == [
        *("clip_grad_norm_", "clip", "grad", "norm"),
        *("of", "dataloader", "data", "loader"),
    ]
    assert index.words("…!") == []


def test_fusion_is_the_sum_of_reciprocal_ranks():
    # 1/61 + 1/62 for document 7; 1/61 for 5; 1/62 for 9
    assert fuse([[7, 9], [5, 7]]) == [7, 5, 9]


def test_metrics_by_hand():
    answers = frozenset("bd")
    assert first_hit("abcd", answers) == 2 and first_hit("ace", answers) == math.inf
    assert ndcg("abcd", answers) == pytest.approx((1 / math.log2(3) + 1 / math.log2(5)) / (1 + 1 / math.log2(3)))
    q = Query("q", "dev", "what", "?", answers, ("b",))
    assert scores(["abcd"], [q]) | {"nDCG@10": 0} == {
        **{"recall@1": [0.0], "recall@5": [1.0], "recall@10": [1.0], "recall@20": [1.0]},
        **{"MRR": [0.5], "nDCG@10": 0},
    }
    low, high = bootstrap([0, 1] * 50)
    assert low < 0.5 < high and high - low == pytest.approx(2 * 1.96 * 0.05, rel=0.15)  # √(0.25 / 100) is 0.05


def test_the_learned_numbers_belong_to_the_features():
    tuned = json.loads(TUNED.read_text())
    assert set(tuned["rerank"]) == set(FEATURES)
    assert set(tuned["decide"]) == {*SIGNALS, "constant"}


@pytest.mark.parametrize("question", ["", "  \n", "?!", "\x00\x07"])
def test_an_empty_question_is_refused(question):
    with pytest.raises(ValueError, match="empty"):
        check_question(question)


def test_an_endless_question_is_refused_and_control_characters_are_dropped():
    with pytest.raises(ValueError, match="1,200 characters"):
        check_question("word " * 239 + "words")
    assert check_question("what\x1b[31m is\n relu") == "what [31m is relu"


# -- the pipeline ---------------------------------------------------------------------------------------------------


def test_a_question_without_words_finds_nothing_by_its_words(pipeline):
    assert pipeline.index.sparse("?! …", 5) == []


def test_the_stages_improve_on_each_other(pipeline):
    """On the development questions, so that nothing is chosen on test. The gains are ten times what a near-tie moves."""
    asked = [q for q in queries("dev") if q.answers]
    made = {stage: np.mean(scores(r, asked)["MRR"]) for stage, r in experiments.stages(pipeline, asked).items()}
    assert max(made["BM25"], made["MiniLM"]) + 0.03 < made["fused"] < made["reranked"] - 0.02


def test_the_confidence_tells_right_from_wrong(pipeline):
    right, wrong = [], []
    for q in queries("test"):
        ranked, score, features = pipeline.rerank(q.query, pipeline.retrieve(q.query))
        sure = pipeline.confidence(pipeline.signals(q.query, score, features))
        (right if pipeline.index.documents[ranked[0]].name in q.answers else wrong).append(sure)
    auroc = np.mean([(r > w) + 0.5 * (r == w) for r in right for w in wrong])
    assert auroc > 0.75
    assert np.mean(right + wrong) == pytest.approx(len(right) / len(right + wrong), abs=0.1)  # it is calibrated


def test_a_sentence_with_a_name_that_the_evidence_lacks_is_not_supported(pipeline):
    evidence = "persistent_workers: if True, the data loader will not shut down the worker processes"
    assert pipeline.supported(
        "Set persistent_workers, and the loader will not shut down the worker processes.", evidence
    )
    assert not pipeline.supported("Call stop_workers, and the loader will not shut down the processes.", evidence)
    assert not pipeline.supported("The loader will not shut down 16 worker processes.", evidence)
    assert not pipeline.supported("Bananas are yellow and bread is baked in ovens.", evidence)


def test_what_is_not_supported_is_replaced_by_a_quotation(pipeline, monkeypatch):
    monkeypatch.setattr(pipeline, "generate", lambda *_: iter(["Call torch.magic_clip with factor 7."]))
    answer = pipeline.answer("how do I clip gradients by norm?")
    assert not answer.refused and "magic" not in answer.text
    name = answer.citations[0]
    quoted = answer.text.split('"')[1]
    body = next(d.body for d in pipeline.index.documents if d.name == name)
    assert quoted in " ".join(body.split())


# -- the command ----------------------------------------------------------------------------------------------------


def test_the_command_answers_with_citations_or_refuses(pipeline, capsys):
    known = {d.name for d in pipeline.index.documents}
    assert command.main(["how do I clip gradients by norm?", "--explain"]) == 0
    shown = capsys.readouterr().out
    cited = [line.split()[1] for line in shown.splitlines() if line.startswith("[")]
    assert cited and set(cited) <= known and "clip_grad" in cited[0]
    for stage in ("retrieve", "rerank", "decide", "first token", "verify"):
        assert stage in shown
    assert command.main(["how long do I bake a loaf of sourdough bread?"]) == 0
    shown = capsys.readouterr().out
    assert "do not find" in shown and "[1]" not in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([" "], "the question is empty"), (["x" * 5000], "5,000 characters")],
)
def test_bad_input_is_one_line_and_no_traceback(arguments, message, capsys):
    assert command.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


def test_a_missing_and_a_stale_index_say_what_to_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path))
    assert command.main(["what is relu?"]) == 2
    assert "no index yet. Run:\n    python -m labs.rag --build" in capsys.readouterr().err
    (tmp_path / "rag-0123456789abcdef-1").mkdir()
    assert command.main(["what is relu?"]) == 2
    assert "stale" in capsys.readouterr().err


def test_a_new_version_embeds_only_what_changed(tmp_path, monkeypatch):
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path))
    first = [
        Document(f"torch.f{i}", "(x)", f"The function number {i}. " + "It computes something. " * 5) for i in range(4)
    ]
    changed = [*first[:3], Document("torch.f3", "(x)", "Now it computes something else altogether. " * 4)]
    reports = []
    for corpus, print_ in ((first, "aa"), (changed, "bb")):
        monkeypatch.setattr(index, "documents", lambda corpus=corpus: tuple(corpus))
        monkeypatch.setattr(index, "fingerprint", lambda print_=print_: print_)
        index.build(reports.append)
    assert reports[0] == "4 documents, 4 chunks, 4 of them to embed"
    assert [r for r in reports if "documents" in r][1] == "4 documents, 4 chunks, 1 of them to embed"
    found = index.load()
    assert found.documents[found.dense("something else altogether", 1)[0][0]].name == "torch.f3"


def test_the_fingerprint_names_the_index_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path))
    assert fingerprint() in index.folder().name and index.folder().parent == tmp_path
