"""The prompts of judges: what is asked of a model about one response, as chat messages.

The texts are files beside this package, `prompts/*.md`: what stands above a line `---` is the system's message, what
stands below the user's. Placeholders are those of string.Template and are filled in one pass, so that nothing that is
filled in is looked at again.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from functools import cache
from importlib import resources
from string import Template
from typing import Any

from services.reward.judging.quoting import Fence, neutralize
from services.reward.verifiers.base import ImagePart

Message = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """What a judge is asked to decide; an empty reference or rubric is not spoken of."""

    question: str
    reference: str
    rubric: str
    response: str
    images: tuple[ImagePart, ...] = ()


@dataclass(frozen=True)
class Quoted:
    """A case whose texts are safe to quote, the fence to quote them with, and the addresses of its images."""

    case: Case
    fence: Fence
    image_urls: tuple[str, ...]

    @classmethod
    def of(cls, case: Case) -> Quoted:
        """The case with all its texts neutralized; takes a while for long texts."""
        question, reference, rubric, response = texts = [
            neutralize(text) for text in (case.question, case.reference, case.rubric, case.response)
        ]
        image_urls = tuple(image_url(image) for image in case.images)
        return cls(Case(question, reference, rubric, response), Fence.around(texts), image_urls)


def build_messages(quoted: Quoted, by_schema: bool, max_response_characters: int) -> list[Message]:
    """The chat that asks for a judgement: as JSON by schema, or in words that end with a signed judgement."""
    case, fence = quoted.case, quoted.fence
    format_system, format_user = _load("format_schema" if by_schema else "format_words")
    pieces = {
        "question": fence.wrap("QUESTION", case.question),
        "reference": fence.wrap("REFERENCE", case.reference) if case.reference else "There is no reference answer.",
        "rubric": fence.wrap("RUBRIC", case.rubric),
        "response": fence.wrap("RESPONSE", fence.cut(case.response, max_response_characters)),
        "nonce": fence.nonce,
        "format": format_system.substitute(nonce=fence.nonce),
        "closing": format_user.substitute(nonce=fence.nonce),
    }
    system, user = (
        template.substitute(pieces) for template in _load("judge_rubric" if case.rubric else "judge_answer")
    )
    if not quoted.image_urls:
        return [{"role": "system", "content": system}, {"role": "user", "content": user}]
    images = [{"type": "image_url", "image_url": {"url": url}} for url in quoted.image_urls]
    return [
        {"role": "system", "content": system},
        {"role": "user", "content": [{"type": "text", "text": user}, *images]},
    ]


def image_url(image: ImagePart) -> str:
    """The address of an image: its own, or a data URL of its bytes."""
    return image.url or f"data:{image.media_type};base64,{base64.b64encode(image.data).decode()}"


@cache
def _load(name: str) -> tuple[Template, Template]:
    text = (resources.files("services.reward") / "prompts" / f"{name}.md").read_text(encoding="utf-8")
    system, separator, user = text.partition("\n---\n")
    assert separator, name
    return Template(system.strip()), Template(user.strip())
