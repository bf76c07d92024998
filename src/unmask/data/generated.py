"""Problems made up by reasoning-gym, as many as wanted, none of them stored.

Owns the making of records; order within a pass is that of making. Knows neither tokens nor files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unmask.data.documents import Document, State
from unmask.data.encoding import DocumentEncoder
from unmask.data.hashing import hash_ints, hash_text
from unmask.errors import ConfigError, DataError

Families = Mapping[str, Mapping[str, Any]]


class GeneratedSource:
    """Question and answer pairs; item i of epoch e is a function of (seed, e, i), and the families take turns."""

    def __init__(self, name: str, families: Families, encoder: DocumentEncoder, *, seed: int, items_per_epoch: int) -> None:
        """Make problems.

        Args:
            name: for messages.
            families: name of a reasoning-gym dataset -> its configuration, without seed and size.
            encoder: makes documents of records with its fields `prompt` and first `response`.
            seed: of the problems.
            items_per_epoch: documents called one pass; each pass makes new ones.

        Raises:
            ConfigError: no family, an unknown one, or a configuration it does not accept.
        """
        if not families:
            raise ConfigError("0 families of problems given; name at least one, such as chain_sum: {}")
        if items_per_epoch < 1:
            raise ConfigError(f"{items_per_epoch} items an epoch is not positive; use 1 or more")
        self.name = name
        self._families = dict(families)
        self._encoder = encoder
        self._seed = seed
        self._items_per_epoch = items_per_epoch
        self.epoch = 0
        self._cursor = 0
        self._datasets = self._open(0)

    def next_document(self) -> Document:
        """The next problem; raises DataError when its family makes one without question or answer."""
        family = list(self._datasets)[self._cursor % len(self._datasets)]
        entry = self._datasets[family][self._cursor // len(self._datasets)]
        fields = self._encoder.fields
        record = {fields.prompt: entry["question"], fields.response[0]: entry["answer"]}
        document = self._encoder.encode(record, f"{self.name} {family} item {self._cursor} of epoch {self.epoch}")
        self._cursor += 1
        if self._cursor == self._items_per_epoch:
            self.epoch, self._cursor = self.epoch + 1, 0
            self._datasets = self._open(self.epoch)
        return document

    def state_dict(self) -> State:
        """The pass and the place in it."""
        return {"items_per_epoch": self._items_per_epoch, "epoch": self.epoch, "cursor": self._cursor}

    def load_state_dict(self, state: State) -> None:
        """Continue where `state` was taken; raises DataError when an epoch was of another length then."""
        if state["items_per_epoch"] != self._items_per_epoch:
            raise DataError(
                f"{self.name} makes {self._items_per_epoch} items an epoch, {state['items_per_epoch']} when the job was "
                "saved; use the same number"
            )
        self.epoch, self._cursor = int(state["epoch"]), int(state["cursor"])
        self._datasets = self._open(self.epoch)

    def _open(self, epoch: int) -> dict[str, Any]:
        """The families' datasets for one pass; they make an item when it is asked for."""
        return {family: self._open_family(family, config, epoch) for family, config in self._families.items()}

    def _open_family(self, family: str, config: Mapping[str, Any], epoch: int) -> Any:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS

        if family not in DATASETS:
            known = ", ".join(sorted(DATASETS))
            raise ConfigError(f"{family} is no family of reasoning-gym; use one of {known}")
        taken = sorted({"seed", "size"} & set(config))
        if taken:
            raise ConfigError(f"{taken[0]} of family {family} is set by the source; remove it and use items_per_epoch")
        seed = hash_ints(self._seed, hash_text(family), epoch) >> 33
        size = -(-self._items_per_epoch // len(self._families))
        try:
            return reasoning_gym.create_dataset(family, **config, seed=seed, size=size)
        except (TypeError, ValueError, AssertionError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"configuration {dict(config)} of family {family} is refused ({reason}); correct it") from error
