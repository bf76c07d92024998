"""How ranks start: the round they agree on, their recipes, the job that a folder belongs to, the devices of the machine."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from helpers import refused
from unmask.errors import ConfigError, LostRanksError, TrainingError
from unmask.lock import locked
from unmask.train.parallel.fatal import fatal_status, is_first_print, record_fatal
from unmask.train.parallel.ranks import agree_on_round, compare_recipes
from unmask.train.parallel.start import check_devices, job_name, restarted


def agreed(store: Store, size: int) -> set[str]:
    with ThreadPoolExecutor(size) as pool:
        return set(pool.map(lambda rank: agree_on_round(store, rank, size, 20), reversed(range(size))))


def test_every_start_of_the_ranks_has_a_name_of_its_own() -> None:
    store = dist.HashStore()
    with refused(LostRanksError, "rank 2"), ThreadPoolExecutor(2) as pool:
        late = pool.submit(agree_on_round, store, 1, 3, 0.3)
        agree_on_round(store, 0, 3, 0.2)
    assert late.exception() is not None
    names = [agreed(store, 3) for _ in range(3)]
    assert [len(each) for each in names] == [1, 1, 1]
    assert len(set.union(*names)) == 3


def test_a_rank_with_another_recipe_is_named_on_every_rank() -> None:
    store = dist.HashStore()
    with ThreadPoolExecutor(3) as pool:
        texts = ["micro_rows: 1", "micro_rows: 1", "micro_rows: 2"]
        found = [pool.submit(compare_recipes, store, rank, 3, text) for rank, text in enumerate(texts)]
    for each in found:
        with refused(ConfigError, "rank 2", "recipe"):
            each.result()


def test_a_folder_is_gone_on_with_by_the_job_that_began_it_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not restarted(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "first")
    (tmp_path / ".lock").write_text("first")  # What a job leaves that is killed.
    assert restarted(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "second")
    assert not restarted(tmp_path)
    with locked(tmp_path, "second"):
        assert restarted(tmp_path)
    assert not restarted(tmp_path)
    with refused(TrainingError, "nan"), locked(tmp_path, "second"):
        raise TrainingError("loss nan")
    assert not restarted(tmp_path)


def test_a_job_that_is_started_anew_under_the_same_name_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mine")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    stores = [dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False) for _ in range(2)]
    monkeypatch.setenv("MASTER_PORT", str(stores[0].port))
    (tmp_path / ".lock").write_text(job_name())
    assert restarted(tmp_path)
    monkeypatch.setenv("MASTER_PORT", str(stores[1].port))
    assert not restarted(tmp_path)


def test_a_fatal_error_is_found_by_later_ranks_and_printed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fatal_status() is None
    assert is_first_print()
    assert is_first_print()  # Without agents nothing is started again.
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    assert fatal_status() is None
    record_fatal(2)
    assert fatal_status() == 2
    assert [is_first_print(), is_first_print()] == [True, False]


def test_more_processes_than_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_devices(8, "cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with refused(ConfigError, "3 processes", "2 CUDA devices"):
        check_devices(3, "cuda")
