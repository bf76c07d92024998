"""How errors of the library are spelled on the command line."""

from __future__ import annotations

import pytest

from unmask.cli.console import with_flags


@pytest.mark.parametrize(
    ("message", "spelled"),
    [
        ("top_k is 0; it must be at least 1", "--top-k is 0; it must be at least 1"),
        ("window is 2 without an edit_threshold", "--window is 2 without an --edit-threshold"),
        ("shorten the prompt or lower max_new_tokens", "shorten the prompt or lower --max-new-tokens"),
        ("regex and grammar are both given; take one", "--regex and --grammar are both given; take one"),
        ("json_schema and regex and grammar are both given", "--json-schema and --regex and --grammar are both given"),
        ("the text has no stop and no seed", "the text has no stop and no seed"),
        ("decode_block_size is 3", "decode_block_size is 3"),
        ("use plain text (chat=False)", "use plain text (--raw)"),
    ],
)
def test_fields_become_flags(message: str, spelled: str) -> None:
    assert with_flags(message) == spelled
