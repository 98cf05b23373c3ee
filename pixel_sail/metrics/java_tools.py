"""The PTB tokenizer and METEOR 1.5, the two Java programs of COCO's caption scores, with timeouts and restarts.

Captions -> `CaptionTools.tokenize` -> `metrics/captions.py` -> `CaptionTools.meteor`. Both jars come from the PyPI
package pycocoevalcap, so scores are comparable. The package's own wrappers hang or shift lines if a process dies or a
caption contains a line break.

Example: tokenize(["A dog, I think."]) -> ["a dog i think"]. METEOR answers each line on its standard input with a line:

    SCORE ||| reference ||| reference ||| hypothesis   -> 23 counts
    EVAL ||| counts of item 1 ||| counts of item 2     -> score of item 1, of item 2, of all together
"""

import importlib.util
import logging
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from pixel_sail.types import DataError

logger = logging.getLogger(__name__)

TOKENIZER_JAR = "tokenizer/stanford-corenlp-3.4.1.jar"
METEOR_JAR = "meteor/meteor-1.5.jar"

PUNCTUATION_TOKENS = frozenset(
    ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)
"""Tokens that COCO's caption evaluation drops (pycocoevalcap 1.2). Brackets are not dropped, because the list has them
in capitals and the tokenizer writes lower case. Kept as is, since published scores depend on it."""

NUM_COUNTS = 23
"""Number of values METEOR 1.5 returns for one caption."""

SEPARATOR = " ||| "

_PIPES = "|||"


class CaptionTools:
    """Runs both programs. METEOR is started on first use and runs until `close`.

    A METEOR process takes about ten seconds to load and up to 2 GB, so use one for all scores.
    """

    def __init__(self, *, timeout_s: float = 300.0) -> None:
        """Locate Java and the package.

        timeout_s: time limit for the tokenizer, and for METEOR per line. Raises: DataError if something is missing.
        """
        java = find_java()
        folder = package_folder("pycocoevalcap")
        for jar in (TOKENIZER_JAR, METEOR_JAR):
            if not (folder / jar).is_file():
                raise DataError(f"{folder}: found no {jar}, expected that of pycocoevalcap 1.2; install it again")
        # The encoding must not depend on the locale. METEOR finds its data next to its jar.
        utf8 = "-Dfile.encoding=UTF-8"
        tokenizer = ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase", "-encoding", "UTF-8"]
        self._tokenizer = [java, utf8, "-cp", str(folder / TOKENIZER_JAR), *tokenizer]
        meteor = [java, utf8, "-Xmx2G", "-jar", str(folder / METEOR_JAR), "-", "-", "-stdio", "-l", "en", "-norm"]
        self._meteor = LineProcess(meteor, timeout_s=timeout_s)
        self._timeout_s = timeout_s

    def __enter__(self) -> "CaptionTools":
        """Return itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """End METEOR."""
        self.close()

    def close(self) -> None:
        """End METEOR if it runs."""
        self._meteor.close()

    def tokenize(self, captions: Sequence[str]) -> list[str]:
        """Return the captions as lower-case words separated by blanks, without punctuation; "" if no word is left.

        Raises: DataError if the tokenizer fails twice.
        """
        if not captions:
            return []
        lines = "".join(one_line(caption) + "\n" for caption in captions)
        tokenized = self._run_tokenizer(lines).split("\n")
        if len(tokenized) != len(captions) + 1:
            raise DataError(
                f"PTB tokenizer: found {len(tokenized) - 1} lines for {len(captions)} captions, expected one for each; "
                "score halves of the captions to find the one that fails"
            )
        return [
            " ".join(token for token in line.rstrip().split(" ") if token not in PUNCTUATION_TOKENS)
            for line in tokenized[:-1]
        ]

    def meteor(
        self, references: Sequence[Sequence[str]], hypotheses: Sequence[str], names: Sequence[str]
    ) -> tuple[float, list[float]]:
        """Return METEOR 1.5 of the set of tokenized captions, and of each, as fractions.

        names: names of the items for errors. Raises: DataError naming the item if METEOR fails twice on it.
        """
        if not len(references) == len(hypotheses) == len(names) > 0:
            raise DataError(
                f"METEOR: found {len(references)} items with references, {len(hypotheses)} hypotheses and "
                f"{len(names)} names, expected equal numbers above 0; check the caller"
            )
        counts = []
        for sentences, hypothesis, name in zip(references, hypotheses, names, strict=True):
            # A hypothesis without words must keep the blank before it: METEOR rejects a line that ends in bars.
            line = "SCORE" + SEPARATOR + SEPARATOR.join([*sentences, hypothesis])
            counts.append(self._meteor.ask(line, 1, f"item {name}", _are_counts)[0])
        answers = self._meteor.ask(
            SEPARATOR.join(["EVAL", *counts]), len(counts) + 1, f"the total of {len(counts)} items", _is_fraction
        )
        scores = [float(answer) for answer in answers]
        return scores[-1], scores[:-1]

    def _run_tokenizer(self, lines: str) -> str:
        error = ""
        for attempt in (1, 2):
            try:
                done = subprocess.run(
                    self._tokenizer, input=lines.encode("utf-8"), capture_output=True, timeout=self._timeout_s
                )
            except subprocess.TimeoutExpired:
                error = f"no end after {self._timeout_s:g} s"
            else:
                if done.returncode == 0:
                    return done.stdout.decode("utf-8")
                error = f"exit {done.returncode}: {_tail(done.stderr)}"
            logger.warning("PTB tokenizer, attempt %d of 2: %s", attempt, error)
        raise DataError(f"PTB tokenizer: failed twice, {error}; expected exit status 0, check memory and Java")


class LineProcess:
    """A program that answers lines, started on first use. A failed request is retried once with a new process."""

    def __init__(self, command: list[str], *, timeout_s: float) -> None:
        self._command = command
        self._timeout_s = timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._stderr: IO[bytes] | None = None

    def ask(self, line: str, num_answers: int, name: str, is_sound: Callable[[str], bool]) -> list[str]:
        """Return the answer lines to one line. Raises: DataError if two processes in a row give no valid answer."""
        found = ""
        for attempt in (1, 2):
            answers = self._exchange(line, num_answers)
            if len(answers) == num_answers and all(is_sound(answer) for answer in answers):
                return answers
            unsound = [answer for answer in answers if not is_sound(answer)]
            said = f"the answer {unsound[0][:200]!r}" if unsound else "no answer"
            found = f"{said} after {len(answers)} of {num_answers} lines, stderr {self._complaint()!r}"
            self.close()
            logger.warning("METEOR, %s, attempt %d of 2: found %s", name, attempt, found)
        raise DataError(
            f"METEOR, {name}: failed twice, found {found}, expected {num_answers} lines of numbers within "
            f"{self._timeout_s:g} s each; the line was {line[:200]!r}. Check memory (2 GB) and Java"
        )

    def close(self) -> None:
        """Terminate the process and wait for it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout, self._stderr):
                if stream is not None:
                    _close_quietly(stream)
        self._process = self._stderr = None

    def _exchange(self, line: str, num_answers: int) -> list[str]:
        """Return the answers that arrived in time. A late process is killed, which ends reading and writing."""
        process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None
        watchdog = threading.Timer(self._timeout_s, process.kill)
        watchdog.start()
        answers: list[str] = []
        try:
            process.stdin.write(line.encode("utf-8") + b"\n")
            process.stdin.flush()
            while len(answers) < num_answers and (answer := process.stdout.readline()):
                answers.append(answer.decode("utf-8", "replace").strip())
        except BrokenPipeError:
            pass  # The process died. The caller notices missing answers.
        finally:
            watchdog.cancel()
        return answers

    def _start(self) -> subprocess.Popen[bytes]:
        # Into a file: it is not read while the process runs, and a full pipe would block it.
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 (open until the process ends)
        try:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr
            )
        except OSError as error:
            raise DataError(f"METEOR: cannot start {self._command[0]} ({error}), expected Java; install it") from error
        return self._process

    def _complaint(self) -> str:
        if self._stderr is None:
            return ""
        self._stderr.seek(0)
        return _tail(self._stderr.read())


def one_line(caption: str) -> str:
    """Return a caption as one line and one field: white space and ||| become a blank.

    Unpaired surrogates, which cannot be encoded, become question marks.
    """
    words = caption.replace(_PIPES, " ").split()
    return " ".join(words).encode("utf-8", "replace").decode("utf-8")


def find_java() -> str:
    """Return the path of a working Java. Raises: DataError."""
    java = shutil.which("java")
    advice = "install a Java runtime, version 8 or newer (Debian, Ubuntu: apt-get install default-jre-headless)"
    if java is None:
        raise DataError(f"caption scores: found no java on PATH, expected one for METEOR and the tokenizer; {advice}")
    try:
        done = subprocess.run([java, "-version"], capture_output=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DataError(f"caption scores: found {java} that does not run ({error}); {advice}") from error
    if done.returncode != 0:
        raise DataError(f"caption scores: found {java} that does not run ({_tail(done.stderr)}); {advice}")
    return java


def package_folder(name: str) -> Path:
    """Return the folder of an installed package without importing it. Raises: DataError if it is not installed."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            f"caption scores: found no Python package {name}, expected it; install the extra, in the checkout: "
            "pip install -e '.[captions]'"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _are_counts(answer: str) -> bool:
    return len(answer.split()) == NUM_COUNTS and all(_is_number(word) for word in answer.split())


def _is_fraction(answer: str) -> bool:
    return _is_number(answer) and 0.0 <= float(answer) <= 1.0


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _tail(stderr: bytes) -> str:
    return stderr.decode("utf-8", "replace").strip()[-300:]


def _close_quietly(stream: IO[bytes]) -> None:
    """Close a pipe whose other end may be closed."""
    try:
        stream.close()
    except BrokenPipeError:
        logger.debug("a pipe to a dead process held unsent text")
