"""The commands of the training harness."""

from __future__ import annotations

import dataclasses
import sys
from importlib import import_module
from typing import Any

from .parser import UsageError, add_fields, check_configs, check_layer, expand_preset, make_parser, parse, presets


@dataclasses.dataclass
class Training:
    """A task as the command line sees it. `config` and `run` are names within fastrnn.text."""

    config: str
    run: str
    description: str
    examples: str


TASKS = {
    "classify": Training(
        "ClassifyConfig",
        "train_classify",
        "Trains a recurrent classifier of texts or of real-valued sequences.",
        """examples:
  fastrnn train classify                                 docstrings of Python's library, by package
  fastrnn train classify --data aclImdb.tar.gz           SPLIT/LABEL/*.txt in a folder or tar archive
  fastrnn train classify --data reviews.csv --text-column review --label-column stars --target number
  fastrnn train classify --data gestures/ --input series SPLIT/LABEL/*.npy, each (steps, features)
  fastrnn train classify --preset tutorial               embedding 100, 2-layer LSTM 256, dropout 0.5, packed
""",
    ),
    "lm": Training(
        "LmConfig",
        "train_lm",
        "Trains a recurrent language model.",
        """examples:
  fastrnn train lm                                       on the English text that Python itself carries
  fastrnn train lm --data book.txt --level bpe --tied --emb-size 256
  fastrnn train lm --preset ptb-small --data ptb/        ptb/ holds *train*, *valid*, *test*
  fastrnn train lm --config run.yaml --epochs 20         --print_config writes such a file
  fastrnn train lm --resume runs/lm-001                  goes on exactly where a stopped run was
""",
    ),
}

TASKS["translate"] = Training(
    "TranslateConfig",
    "train_translate",
    "Trains an encoder and a decoder with attention: translation, or any text to another.",
    """examples:
  fastrnn train translate                                dates as people write them, to ISO dates
  fastrnn train translate --data multi30k/ --source de --target en --lower
  fastrnn train translate --data cmn.tsv.gz --source-column 2 --target-column 1 --source-words jieba
  fastrnn train translate --data questions.tsv           question, tab, answer
""",
)


def train(task: str, args: list[str]) -> int:
    made, given, options = configured(task, args)
    run = getattr(import_module("fastrnn.text"), TASKS[task].run)
    run(made, resume=options["resume"], given=given, overwrite=options["overwrite"], echo=say)
    return 0


def configured(task: str, args: list[str]) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The configuration that `args` give, what of it they themselves name, and all options.

    Raises:
        UsageError, UserError: what is wrong, in one line.
    """
    package = import_module("fastrnn.text")
    entry = TASKS[task]
    config = getattr(package, entry.config)
    parser = make_parser(f"train {task}", entry.description, entry.examples)
    parser.add_argument("--config", action="config", help="YAML file of options; those after it on the line prevail")
    named = ", ".join(presets(task))
    parser.add_argument("--preset", default=None, help=f"options of a described run: {named}")
    parser.add_argument(
        "--resume", nargs="?", const="auto", default=None, type=str | None,
        help="go on with a run: its folder or checkpoint; without a value, the run in --out",
    )  # fmt: skip
    parser.add_argument("--overwrite", nargs="?", const=True, default=False, type=bool, help="replace the run in --out")
    add_fields(parser, config)
    args = expand_preset(task, args)
    check_configs(args)
    options = vars(parse(parser, args))
    fields = config.__dataclass_fields__
    given = {k: v for k, v in vars(parse(parser, args, defaults=False)).items() if k in fields}
    return config(**{name: options[name] for name in fields}), given, options


def evaluate(args: list[str]) -> int:
    parser = make_parser("evaluate", "The score of a trained model on other data.")
    parser.add_argument("--checkpoint", required=True, type=str, help="best.ckpt of a run")
    parser.add_argument(
        "--data", default=None, type=str | None,
        help="other data: all of a file, of a folder *test*, else *valid*, else all; by default what was trained on",
    )  # fmt: skip
    parser.add_argument("--split", default=None, type=str | None, help="train, valid or test; held-out ones, too")
    parser.add_argument("--batch-size", default=10, type=int, help="lm: columns; 1 scores the text as one stream")
    parser.add_argument("--layer", default=None, type=str | None, help="fastrnn or torch; as trained by default")
    options = parse(parser, args)
    if options.batch_size < 1:
        raise UsageError(f"--batch-size must be at least 1, got {options.batch_size}")
    check_layer(options.layer)
    from ..text.evaluate import evaluate_checkpoint

    for line in evaluate_checkpoint(options.checkpoint, options.data, options.split, options.batch_size, options.layer):
        print(line)
    return 0


def generate(args: list[str]) -> int:
    parser = make_parser("generate", "Text from a trained language model.")
    parser.add_argument("--checkpoint", required=True, type=str, help="best.ckpt of a run")
    parser.add_argument("--prompt", default="", type=str, help="text to go on from")
    parser.add_argument("--length", default=400, type=int, help="tokens to add")
    parser.add_argument("--temperature", default=0.8, type=float, help="below 1: keep to the likely; 0: the likeliest")
    parser.add_argument("--top-k", default=0, type=int, help="draw among the k likeliest; 0: all")
    parser.add_argument("--top-p", default=1.0, type=float, help="draw among the likeliest that sum to p")
    parser.add_argument("--seed", default=None, type=int | None, help="the same seed gives the same text")
    parser.add_argument("--layer", default=None, type=str | None, help="fastrnn or torch; as trained by default")
    o = parse(parser, args)
    check_layer(o.layer)
    from ..text.kernels import trusted
    from ..text.sampling import generate as draw
    from ..text.tasks.lm import load_model

    model, vocabulary, _ = load_model(o.checkpoint, o.layer)
    with trusted("there is no text: generate again, or with --layer torch"):
        text = draw(model, vocabulary, o.prompt, o.length, o.temperature, o.top_k, o.top_p, o.seed)
    print(text)
    return 0


def predict(args: list[str]) -> int:
    parser = make_parser("predict", "Labels by a classifier, or translations by a translator, one line each.")
    parser.add_argument("--checkpoint", required=True, type=str, help="best.ckpt of a run")
    parser.add_argument("--text", default=None, type=str | None, help="one text")
    parser.add_argument("--data", default=None, type=str | None, help="a text each line; for series, a .npy or .csv")
    parser.add_argument("--top", default=1, type=int, help="classifier: likeliest labels to print")
    parser.add_argument("--beam", default=5, type=int, help="translator: hypotheses kept; 1: the likeliest token")
    parser.add_argument("--layer", default=None, type=str | None, help="fastrnn or torch; as trained by default")
    o = parse(parser, args)
    check_layer(o.layer)
    if o.text is not None and o.data is not None:
        raise UsageError("--text and --data exclude each other")
    if o.top < 1 or o.beam < 1:
        raise UsageError(f"--top and --beam must be at least 1, got {o.top}, {o.beam}")
    from ..text.prediction import predict_lines

    for line in predict_lines(o.checkpoint, o.text, o.data, o.top, o.beam, o.layer):
        print(line)
    return 0


def prepare(args: list[str]) -> int:
    from typing import Literal

    parser = make_parser("prepare", "Tokenizes text once, in parallel, into files that training maps into memory.")
    parser.add_argument("--data", required=True, type=str, help="text file or folder of *train*, *valid*, *test*")
    parser.add_argument("--out", required=True, type=str, help="new folder, the --data of fastrnn train lm")
    parser.add_argument("--level", default="bpe", type=Literal["char", "word", "bpe"], help="what a token is")
    parser.add_argument("--vocab-size", default=None, type=int | None, help="largest vocabulary")
    parser.add_argument("--words", default="blanks", type=Literal["blanks", "split", "jieba"], help="level word: words")
    parser.add_argument("--lower", nargs="?", const=True, default=False, type=bool, help="lower-case the text")
    parser.add_argument("--workers", default=1, type=int, help="processes")
    parser.add_argument("--valid-share", default=0.1, type=float, help="where there is no *valid* file")
    o = parse(parser, args)
    if o.workers < 1 or not 0 < o.valid_share < 1 or (o.vocab_size is not None and o.vocab_size < 2):
        raise UsageError(
            f"--workers and --vocab-size must be at least 1 and 2 and --valid-share in (0, 1), "
            f"got {o.workers}, {o.vocab_size}, {o.valid_share}"
        )
    from ..text.data.prepare import prepare as run
    from ..text.data.segment import Segmenter

    segmenter = Segmenter(o.words, o.lower)
    progress = sys.stderr.isatty()
    run(o.data, o.out, o.level, o.vocab_size, segmenter, o.workers, o.valid_share, progress, say)
    return 0


def say(line: str) -> None:
    """A line of the report, above the progress bar if there is one."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    tqdm.write(line)
    sys.stdout.flush()
