"""Every record on the page of dataset formats is read, and what it says is learnt is what is learnt."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from helpers import flagged_texts, make_tokenizer
from unmask.data.documents import Document
from unmask.data.encoding import DocumentEncoder
from unmask.data.tokenizer import Tokenizer

PAGE = Path(__file__).parents[2] / "docs" / "datasets.md"
EXAMPLE = re.compile(r"^```json\n(.*?)^```\n\nLearnt: (.*?)(?:, rejected: (.*?))?$", re.DOTALL | re.MULTILINE)
EXAMPLES = [match.groups() for match in EXAMPLE.finditer(PAGE.read_text())]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + (message['content'] or '') }}"
    "{% for call in message['tool_calls'] or [] %}{{ '<tool_call>' + call['function'] | tojson + '</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"), chat_template=TEMPLATE)


def learnt(tokenizer: Tokenizer, document: Document) -> list[str]:
    """Text of each stretch of tokens that is masked and predicted."""
    return flagged_texts(tokenizer, document.tokens.tolist(), document.maskable.tolist())


def test_every_example_of_the_page_is_found() -> None:
    assert len(EXAMPLES) == PAGE.read_text().count("```json") > 5


@pytest.mark.parametrize(("record", "chosen", "rejected"), EXAMPLES)
def test_example_of_the_page(tokenizer: Tokenizer, record: str, chosen: str, rejected: str | None) -> None:
    document = DocumentEncoder(tokenizer, pairs=rejected is not None).encode(json.loads(record), "the page")
    assert learnt(tokenizer, document) == re.findall(r"`(.*?)`", chosen)
    if rejected is not None:
        assert document.rejected is not None
        assert learnt(tokenizer, document.rejected) == re.findall(r"`(.*?)`", rejected)
