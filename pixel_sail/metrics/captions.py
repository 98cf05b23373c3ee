"""METEOR, CIDEr, BLEU and ROUGE-L of descriptions, in two protocols that are named with every score.

References and answers by item id (cleaned by `metrics/answer_text.py`) -> `score_captions` -> `CaptionScores` -> table.
Example: {"7": ("a dog on grass",)} and {"7": "a dog"} -> meteor, cider, bleu1..4, rouge_l.

- `standard`: as COCO: PTB tokens, METEOR 1.5, CIDEr, BLEU and ROUGE-L of the answer against its references. Also what
  the release does for RefCOCOg regions and grounded captions.
- `paper`: as the release does for PerBench, where reference and hypothesis are exchanged: NLTK's METEOR on words
  between blanks, in lower case, and CIDEr on PTB tokens, whose word weights then come from the answers. Its
  values are not comparable with METEOR and CIDEr elsewhere.

These scores are no sums over items: CIDEr weighs words by how many items' references hold them, METEOR and BLEU divide
sums by sums. So the captions of all ranks are gathered first and scored in one go; what each item scores is kept too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from pixel_sail.metrics.java_tools import CaptionTools
from pixel_sail.metrics.nltk_meteor import nltk_meteor, wordnet_folder
from pixel_sail.types import PROTOCOLS, DataError


@dataclass(frozen=True, kw_only=True)
class CaptionScores:
    """Scores of a set of captions; fractions, but CIDEr, whose scale of 0 to 10 is that of the COCO evaluation."""

    protocol: str
    corpus: Mapping[str, float]
    """Of the whole set."""
    per_item: Mapping[str, Mapping[str, float]]
    """By score, then item. Of cider, rouge_l and, in `paper`, meteor the mean is the score of the set."""
    count: int
    num_wordless: int
    """Answers without any word; they score 0."""

    def summary(self) -> dict[str, float | int]:
        """Return the scores of the set by name, and the counts."""
        return {**self.corpus, "count": self.count, "wordless": self.num_wordless}

    def item_means(self) -> dict[str, Mapping[str, float]]:
        """Return, by item, the scores of which the mean is that of the set; METEOR 1.5 and BLEU are none.

        What CIDEr gives an item depends on the references of all: its word weights.
        """
        names = ("cider", "rouge_l") if self.protocol == "standard" else ("cider", "meteor")
        return {name: self.per_item[name] for name in names}


def check_caption_tools(protocol: str) -> None:
    """Raise DataError unless all that `score_captions` needs is installed; to be called before inference."""
    CaptionTools().close()
    _check_protocol(protocol)
    if protocol == "paper":
        wordnet_folder()


def check_references(references: Mapping[str, Sequence[str]], protocol: str) -> None:
    """Raise DataError unless every item has references with words; to be called before inference."""
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
                "'paper', as reference and answer change places; use 'standard'"
            )


def score_captions(
    references: Mapping[str, Sequence[str]],
    hypotheses: Mapping[str, str],
    *,
    protocol: str = "standard",
    tools: CaptionTools | None = None,
) -> CaptionScores:
    """Return the scores of one answer per item against the item's references.

    tools: a running METEOR to be used again; None starts one and ends it.
    Raises: DataError when ids differ, a reference has no words, or a program is missing or fails.
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
        # The release ends with an error here: no word, no word weights.
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
    """Return the texts as PTB tokens, by the same ids; all in one call, as each starts Java."""
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
