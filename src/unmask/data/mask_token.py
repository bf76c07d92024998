"""Choice of a mask token among the tokens that a tokenizer has.

Owns the order of preference. Changes neither tokenizer nor model.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from unmask.data.tokenizer import Tokenizer
from unmask.errors import CheckpointError

_MASK_NAMES = ("<|mask|>", "<|MASK|>", "<|mdm_mask|>", "<mask>", "[MASK]", "<MASK>")
_SPARE_NAME = re.compile(r"reserved|unused|placeholder|dummy|extra_", re.IGNORECASE)
_VESTIGIAL_NAME = re.compile(
    r"^<\|?(repo_?name|file_sep|filename|gh_stars|issue_(start|comment|closed)|jupyter_\w+|empty_output|fim_\w+"
    r"|vision_\w+|image_pad|video_pad|box_(start|end)|quad_(start|end)|object_ref_(start|end))\|?>$"
)
_CONVENTIONAL_NAMES = frozenset(
    {"<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"}
    | {"<|eom_id|>", "<|role_end|>", "<s>", "</s>", "<unk>", "<pad>", "[CLS]", "[SEP]", "[PAD]", "[UNK]", "[gMASK]"}
)
_APPENDED_NAME = "<|mask|>"


@dataclass(frozen=True)
class MaskChoice:
    """The token that serves as `[MASK]`.

    Attributes:
        token: its spelling.
        id: its id.
        appended: it is new to the tokenizer; the model must grow if `id` is not below its vocabulary size.
    """

    token: str
    id: int
    appended: bool


def choose_mask_token(tokenizer: Tokenizer, vocab_rows: int) -> MaskChoice:
    """Choose a mask token; nothing is changed (`Tokenizer.set_mask_token` does that).

    In this order, the lowest id of each kind, never a token with another role or one the chat template uses:

    1. the tokenizer's own mask token;
    2. an added token spelled like one (`<|mask|>`, `<mask>`, `[MASK]`, ...);
    3. a spare one (`<|reserved_special_token_0|>`, `<unused0>`, ...);
    4. a vestige of a pre-training corpus (`<repo_name>`, `<file_sep>`, `<|fim_pad|>`, `<|vision_pad|>`, ...);
    5. a new `<|mask|>`, in the next free row.

    Args:
        tokenizer: with its added tokens and chat template.
        vocab_rows: rows of the model's embedding; a token without a row is not chosen in 2-4.

    Raises:
        CheckpointError: the tokenizer's own mask token has no row in the model.
    """
    if tokenizer.mask_id is not None and tokenizer.mask_token is not None:
        if tokenizer.mask_id >= vocab_rows:
            raise CheckpointError(
                f"mask token {tokenizer.mask_token} has id {tokenizer.mask_id}, the model has {vocab_rows} rows; "
                "use the tokenizer that belongs to the model"
            )
        return MaskChoice(tokenizer.mask_token, tokenizer.mask_id, appended=False)
    barred = tokenizer.reserved_tokens | _CONVENTIONAL_NAMES
    free = {
        id_: token
        for id_, token in tokenizer.added_tokens.items()
        if id_ < vocab_rows and token not in barred and token not in tokenizer.chat_template
    }
    kinds: tuple[Callable[[str], bool], ...] = (
        lambda token: token in _MASK_NAMES,
        lambda token: _SPARE_NAME.search(token) is not None,
        lambda token: _VESTIGIAL_NAME.match(token) is not None,
    )
    for is_kind in kinds:
        for id_, token in free.items():
            if is_kind(token):
                return MaskChoice(token, id_, appended=False)
    return MaskChoice(_APPENDED_NAME, tokenizer.next_free_id, appended=True)
