"""The objectives of a recipe: a new one is a file of its own and a line here."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from unmask.train.objectives.denoise import DenoiseSection
from unmask.train.objectives.draft import DraftSection
from unmask.train.objectives.next_token import NextTokenSection
from unmask.train.objectives.preference import PreferenceSection

AnyObjective = Annotated[DenoiseSection | NextTokenSection | DraftSection | PreferenceSection, Field(discriminator="kind")]
"""The `objective` section of a recipe; `kind` says which one it is."""
