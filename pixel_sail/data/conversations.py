"""Parses lists of messages by "human" and "gpt" into questions with answers.

`data/sources/llava.py` and `osprey.py` parse the conversations of their records with it.

Example:

    [gpt "Hello!", human "<image>\\nWhat is it?", human "Be brief.", gpt "A dog.", human "Why?"]
    ->  [("What is it?\\nBe brief.", "A dog.")]

Conversations collected from the web do not always alternate. As in the release, a gpt message before the first question
is dropped, so is a final question without an answer, and consecutive messages of one side are joined. (The release
joins questions without a separator and makes a second answer a turn with an empty question; here both are joined by a
line break.)
"""

import re
from typing import Any

from pixel_sail.texts import has_lone_surrogate, shown
from pixel_sail.types import DataError

ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}

_IMAGE_MARKER = re.compile(r"\s*<image>\s*")


def conversation_turns(messages: Any, where: str) -> list[tuple[str, str]]:
    """Return the (question, answer) pairs of a conversation, stripped; none if no question has an answer.

    Raises: DataError for an invalid message, and for a question or an answer without text.
    """
    if not isinstance(messages, list):
        raise DataError(
            f"{where}: found conversations = {shown(messages)}, expected a list of messages; repair the file"
        )
    turns: list[tuple[str, str]] = []
    said: list[tuple[str, list[str]]] = []
    for number, message in enumerate(messages):
        role, text = _parse_message(message, f"{where}, message {number}")
        if said and said[-1][0] == role:
            said[-1][1].append(text)
        elif said or role == "human":
            said.append((role, [text]))
    for (_, questions), (_, answers) in zip(said[::2], said[1::2], strict=False):
        question, answer = ("\n".join(text for text in texts if text) for texts in (questions, answers))
        if not question or not answer:
            raise DataError(
                f"{where}: found question {shown(question)} with answer {shown(answer)}, expected text in both; "
                "repair the file"
            )
        turns.append((question, answer))
    return turns


def may_have_turns(messages: Any) -> bool:
    """Return whether parsing these messages gives a turn or an error, looking only at the roles."""
    if not isinstance(messages, list):
        return True
    roles = [_role(message) for message in messages]
    if None in roles:
        return True
    return "human" in roles and "gpt" in roles[roles.index("human") :]


def _role(message: Any) -> str | None:
    """Return the role of a message, None if it has none."""
    name = message.get("from") if isinstance(message, dict) else None
    return ROLES.get(name) if isinstance(name, str) else None


def _parse_message(message: Any, where: str) -> tuple[str, str]:
    """Return role and text; image markers are removed from questions."""
    role = _role(message)
    text = message.get("value") if isinstance(message, dict) else None
    if role is None or not isinstance(text, str):
        raise DataError(
            f"{where}: found {shown(message)}, expected {{'from': 'human' or 'gpt', 'value': text}}; repair the file"
        )
    if has_lone_surrogate(text):
        raise DataError(
            f"{where}: found an unpaired surrogate in {shown(text)}, expected Unicode text; repair the file"
        )
    return role, (_without_markers(text) if role == "human" else text).strip()


def _without_markers(text: str) -> str:
    """Remove `<image>` with the whitespace around it; in the middle of a text a space or line break stays."""
    return _IMAGE_MARKER.sub(lambda match: "\n" if "\n" in match[0] else " ", text)
