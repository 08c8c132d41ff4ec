"""Training and using recurrent models of text. Needs the extra `fastrnn[train]`.

    from fastrnn.text import LmConfig, generate, load_model, train_lm

    result = train_lm(LmConfig(data="book.txt", hidden_size=256, epochs=5))
    print(result.valid.ppl, generate(result.model, result.vocabulary, prompt="The ", length=200, seed=1))

The names below are imported when first used, so that `import fastrnn` stays quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import ClassifyConfig, LmConfig, TranslateConfig
    from .data.corpus import load_corpus
    from .data.tokens import Vocabulary
    from .errors import Interrupted, UserError
    from .evaluate import evaluate_stream, unigram_perplexity
    from .models.lm import LanguageModel
    from .sampling import generate
    from .tasks.classify import load_classifier, predict, train_classify
    from .tasks.lm import load_model, train_lm
    from .tasks.translate import load_translator, train_translate, translate

_WHERE = {
    "ClassifyConfig": "config",
    "LmConfig": "config",
    "TranslateConfig": "config",
    "load_corpus": "data.corpus",
    "Vocabulary": "data.tokens",
    "Interrupted": "errors",
    "UserError": "errors",
    "evaluate_stream": "evaluate",
    "unigram_perplexity": "evaluate",
    "generate": "sampling",
    "LanguageModel": "models.lm",
    "load_classifier": "tasks.classify",
    "predict": "tasks.classify",
    "train_classify": "tasks.classify",
    "load_model": "tasks.lm",
    "train_lm": "tasks.lm",
    "load_translator": "tasks.translate",
    "train_translate": "tasks.translate",
    "translate": "tasks.translate",
}

__all__ = [
    "ClassifyConfig",
    "Interrupted",
    "LanguageModel",
    "LmConfig",
    "TranslateConfig",
    "UserError",
    "Vocabulary",
    "evaluate_stream",
    "generate",
    "load_classifier",
    "load_corpus",
    "load_model",
    "load_translator",
    "predict",
    "train_classify",
    "train_lm",
    "train_translate",
    "translate",
    "unigram_perplexity",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_WHERE[name]}", __name__), name)
    globals()[name] = value
    return value
