"""METEOR, CIDEr, BLEU and ROUGE-L of captions, in two protocols.

`score_captions` takes references and answers by item id (cleaned by `metrics/answer_text.py`).
Example: {"7": ("a dog on grass",)} and {"7": "a dog"} -> meteor, cider, bleu1..4, rouge_l.

- `standard`: as COCO: PTB tokens, METEOR 1.5, CIDEr, BLEU and ROUGE-L of the answer against its references. The
  release does the same for RefCOCOg regions and grounded captions.
- `paper`: as the release does for PerBench, with reference and hypothesis exchanged: NLTK's METEOR on lower-case words
  split at blanks, and CIDEr on PTB tokens with word weights from the answers. These values are not comparable with
  other METEOR and CIDEr scores.

These scores are not sums over items: CIDEr weights words by the number of items whose references contain them, METEOR
and BLEU are ratios of sums. The captions of all ranks are therefore gathered and scored together. Scores per item are
kept too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from pixel_sail.metrics.java_tools import CaptionTools
from pixel_sail.metrics.nltk_meteor import nltk_meteor, wordnet_folder
from pixel_sail.types import PROTOCOLS, DataError


@dataclass(frozen=True, kw_only=True)
class CaptionScores:
    """Scores of a set of captions. All are fractions, except CIDEr with COCO's scale of 0 to 10."""

    protocol: str
    corpus: Mapping[str, float]
    """Scores of the whole set."""
    per_item: Mapping[str, Mapping[str, float]]
    """By score, then item. The score of the set is the mean for cider, rouge_l and, in `paper`, meteor."""
    count: int
    num_wordless: int
    """Number of answers without words, which score 0."""

    def summary(self) -> dict[str, float | int]:
        """Return the scores of the set by name, and the counts."""
        return {**self.corpus, "count": self.count, "wordless": self.num_wordless}

    def item_means(self) -> dict[str, Mapping[str, float]]:
        """Return by item the scores whose mean is the score of the set, which excludes METEOR 1.5 and BLEU.

        CIDEr of one item depends on the references of all items through its word weights.
        """
        names = ("cider", "rouge_l") if self.protocol == "standard" else ("cider", "meteor")
        return {name: self.per_item[name] for name in names}


def check_caption_tools(protocol: str) -> None:
    """Raise DataError if a requirement of `score_captions` is not installed. Call before inference."""
    CaptionTools().close()
    _check_protocol(protocol)
    if protocol == "paper":
        wordnet_folder()


def check_references(references: Mapping[str, Sequence[str]], protocol: str) -> None:
    """Raise DataError unless every item has references with words. Call before inference."""
    _check_protocol(protocol)
    if not references:
        raise DataError("caption scores: found no item, expected at least one; check the split and the filters")
    for name, sentences in references.items():
        if not sentences or not all(_has_word(sentence) for sentence in sentences):
            raise DataError(
                f"caption scores, item {name}: found references {list(sentences)}, expected text with words in each; "
                "repair the annotation file"
            )
        if protocol == "paper" and len(sentences) != 1:
            raise DataError(
                f"caption scores, item {name}: found {len(sentences)} references, expected exactly 1 in the protocol "
                "'paper', because reference and answer are exchanged; use 'standard'"
            )


def score_captions(
    references: Mapping[str, Sequence[str]],
    hypotheses: Mapping[str, str],
    *,
    protocol: str = "standard",
    tools: CaptionTools | None = None,
) -> CaptionScores:
    """Return the scores of one answer per item against the item's references.

    tools: a running METEOR to reuse; None starts and ends one.
    Raises: DataError if ids differ, a reference has no words, or a program is missing or fails.
    """
    if tools is None:
        with CaptionTools() as own:
            return score_captions(references, hypotheses, protocol=protocol, tools=own)
    check_references(references, protocol)
    _check_ids(references, hypotheses)
    score = _standard if protocol == "standard" else _paper
    return score(references, hypotheses, tools)


def _standard(
    references: Mapping[str, Sequence[str]], hypotheses: Mapping[str, str], tools: CaptionTools
) -> CaptionScores:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    names = list(references)
    expected = _tokenized(references, tools)
    answers = _tokenized({name: (hypotheses[name],) for name in names}, tools)
    meteor, meteors = tools.meteor([expected[name] for name in names], [answers[name][0] for name in names], names)
    cider, ciders = Cider().compute_score(expected, answers)
    rouge, rouges = Rouge().compute_score(expected, answers)
    bleus, bleus_each = Bleu(4).compute_score(expected, answers, verbose=0)
    corpus = {"meteor": meteor, "cider": float(cider), "rouge_l": float(rouge)}
    each = {"meteor": meteors, "cider": ciders, "rouge_l": rouges}
    for order in range(4):
        corpus[f"bleu{order + 1}"] = float(bleus[order])
        each[f"bleu{order + 1}"] = bleus_each[order]
    return _scores("standard", names, corpus, each, num_wordless=sum(not answers[name][0] for name in names))


def _paper(
    references: Mapping[str, Sequence[str]], hypotheses: Mapping[str, str], tools: CaptionTools
) -> CaptionScores:
    from pycocoevalcap.cider.cider import Cider

    names = list(references)
    # Exchanged on purpose: the answer is the reference.
    meteors = [nltk_meteor(hypotheses[name].split(), references[name][0].split()) for name in names]
    answers = _tokenized({name: (hypotheses[name],) for name in names}, tools)
    if any(texts[0] for texts in answers.values()):
        cider, ciders = Cider().compute_score(answers, _tokenized(references, tools))
    else:
        # The release fails here, because there are no words to weight.
        cider, ciders = 0.0, [0.0] * len(names)
    corpus = {"meteor": fmean(meteors), "cider": float(cider)}
    each = {"meteor": meteors, "cider": ciders}
    return _scores("paper", names, corpus, each, num_wordless=sum(not answers[name][0] for name in names))


def _scores(
    protocol: str, names: list[str], corpus: dict[str, float], each: Mapping[str, Sequence[float]], *, num_wordless: int
) -> CaptionScores:
    per_item = {
        score: {name: float(value) for name, value in zip(names, values, strict=True)} for score, values in each.items()
    }
    return CaptionScores(
        protocol=protocol, corpus=corpus, per_item=per_item, count=len(names), num_wordless=num_wordless
    )


def _tokenized(texts: Mapping[str, Sequence[str]], tools: CaptionTools) -> dict[str, list[str]]:
    """Return the texts as PTB tokens, by the same ids. One call for all, because each call starts Java."""
    lines = iter(tools.tokenize([sentence for sentences in texts.values() for sentence in sentences]))
    return {name: [next(lines) for _ in sentences] for name, sentences in texts.items()}


def _check_protocol(protocol: str) -> None:
    if protocol not in PROTOCOLS:
        raise DataError(f"caption scores: found protocol {protocol!r}, expected one of {PROTOCOLS}; correct the config")


def _check_ids(references: Mapping[str, Sequence[str]], hypotheses: Mapping[str, str]) -> None:
    missing, foreign = sorted(references.keys() - hypotheses.keys()), sorted(hypotheses.keys() - references.keys())
    if missing or foreign:
        raise DataError(
            f"caption scores: found {len(missing)} items without an answer, such as {missing[:3]}, and {len(foreign)} "
            f"answers to no item, such as {foreign[:3]}; expected one answer to each of {len(references)} items"
        )


def _has_word(sentence: str) -> bool:
    return any(letter.isalnum() for letter in sentence)
