"""Training through generated kernels follows training through the reference."""

import pytest

from examples.train_char_lm import Config, Corpus, train

SMALL = Config(width=32, heads=2, layers=2, length=48, batch=2, steps=20, warmup=5, characters=50_000)


@pytest.mark.parametrize("attention", ["softmax_attention", "kitchen_sink", "sigmoid_attention", "differential", "mlstm"])
def test_the_first_losses_agree_with_the_reference(attention: str) -> None:
    compiled = train(attention, SMALL, backend="c", progress=False)
    reference = train(attention, SMALL, backend="reference", progress=False)
    assert compiled == pytest.approx(reference, abs=1e-4)
    assert compiled[-1] < compiled[0] - 0.5


def test_a_seed_makes_a_run_repeatable_and_another_one_differs() -> None:
    once = train("softmax_attention", SMALL, backend="reference", progress=False)
    assert once == train("softmax_attention", SMALL, backend="reference", progress=False)
    assert once != train("softmax_attention", SMALL, backend="reference", progress=False, seed=1)


def test_the_corpus_is_real_text_and_knows_its_files() -> None:
    corpus = Corpus.standard_library(30_000)
    text = "".join(corpus.alphabet[n] for n in corpus.text.tolist())
    assert len(text) == 30_000 and "import" in text
    assert corpus.doc.shape == corpus.text.shape and corpus.doc[-1] > 0
