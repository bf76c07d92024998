from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers import make_tokenizer, refused
from unmask.data.documents import DocumentStream, Source
from unmask.data.packing import RowPacker
from unmask.data.pairs import PairPacker
from unmask.data.sources import SourceConfig, open_source
from unmask.data.tokenizer import Tokenizer
from unmask.errors import ConfigError, DataError

NUM_RECORDS = 11
FAMILIES = {"chain_sum": {"max_terms": 3}, "leg_counting": {}}


def records(start: int, stop: int) -> list[dict[str, Any]]:
    return [{"text": f"record {number} " + "x" * (number % 4), "id": number} for number in range(start, stop)]


def write_jsonl(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_parquet(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=2)


def text_folder(folder: Path) -> SourceConfig:
    folder.mkdir()
    for number, row in enumerate(records(0, NUM_RECORDS)):
        (folder / f"{number:02}.txt").write_text(row["text"])
    return SourceConfig(kind="text", path=str(folder))


def jsonl_folder(folder: Path) -> SourceConfig:
    write_jsonl(folder / "a.jsonl", records(0, 4))
    write_jsonl(folder / "b" / "c.jsonl", records(4, NUM_RECORDS))
    return SourceConfig(kind="jsonl", path=str(folder))


def parquet_folder(folder: Path) -> SourceConfig:
    write_parquet(folder / "a.parquet", records(0, 5))
    write_parquet(folder / "b.parquet", records(5, NUM_RECORDS))
    return SourceConfig(kind="parquet", path=str(folder))


def hub_jsonl_folder(folder: Path) -> SourceConfig:
    write_jsonl(folder / "a.jsonl", records(0, 4))
    write_jsonl(folder / "b.jsonl", records(4, 5))
    write_jsonl(folder / "c.jsonl", records(5, NUM_RECORDS))
    return SourceConfig(kind="huggingface", path=str(folder), shuffle_window=3)


def hub_parquet_folder(folder: Path) -> SourceConfig:
    write_parquet(folder / "a.parquet", records(0, 5))
    write_parquet(folder / "b.parquet", records(5, NUM_RECORDS))
    return SourceConfig(kind="huggingface", path=str(folder), shuffle_window=4)


def problems(folder: Path) -> SourceConfig:
    return SourceConfig(kind="reasoning_gym", families=FAMILIES, items_per_epoch=NUM_RECORDS)


STORED = [text_folder, jsonl_folder, parquet_folder, hub_jsonl_folder, hub_parquet_folder]
ALL = [*STORED, problems]
Maker = Callable[[Path], SourceConfig]


def take(tokenizer: Tokenizer, source: Source, count: int) -> list[tuple[int, str]]:
    """Epoch and text of the next documents."""
    taken = []
    for _ in range(count):
        epoch = source.epoch
        taken.append((epoch, tokenizer.decode(source.next_document().tokens)))
    return taken


@pytest.mark.parametrize("make", STORED)
def test_every_pass_has_every_record_once_in_an_order_of_its_own(tmp_path, tokenizer, make: Maker):
    config = make(tmp_path / "data")
    source = open_source(config, tokenizer, 5)
    passes = [take(tokenizer, source, NUM_RECORDS) for _ in range(3)]
    expected = sorted(row["text"] for row in records(0, NUM_RECORDS))
    for epoch, taken in enumerate(passes):
        assert {number for number, _ in taken} == {epoch}
        assert sorted(text for _, text in taken) == expected
    orders = {tuple(text for _, text in taken) for taken in passes}
    other_seed = tuple(text for _, text in take(tokenizer, open_source(config, tokenizer, 6), NUM_RECORDS))
    assert len(orders | {other_seed}) == 4


@pytest.mark.parametrize("make", STORED)
def test_order_of_the_data_without_shuffling(tmp_path, tokenizer, make: Maker):
    config = make(tmp_path / "data").model_copy(update={"shuffle": False})
    taken = take(tokenizer, open_source(config, tokenizer, 5), 2 * NUM_RECORDS)
    assert [text for _, text in taken] == 2 * [row["text"] for row in records(0, NUM_RECORDS)]


@pytest.mark.parametrize("make", ALL)
def test_state_taken_anywhere_continues_exactly(tmp_path, tokenizer, make: Maker):
    config = make(tmp_path / "data")
    source, reference = open_source(config, tokenizer, 5), open_source(config, tokenizer, 5)
    expected = take(tokenizer, reference, 40)
    for place in range(26):
        state = json.loads(json.dumps(source.state_dict()))
        resumed = open_source(config, tokenizer, 5)
        take(tokenizer, resumed, 2)
        resumed.load_state_dict(state)
        assert take(tokenizer, resumed, 14) == expected[place : place + 14], place
        assert json.loads(json.dumps(source.state_dict())) == state, "taking a state moves nothing"
        assert take(tokenizer, source, 1) == expected[place : place + 1]


def test_packed_mixture_of_all_kinds_resumes(tmp_path, tokenizer):
    configs = [make(tmp_path / make.__name__) for make in ALL]

    def open_packer() -> RowPacker:
        sources = [open_source(config, tokenizer, place) for place, config in enumerate(configs)]
        return RowPacker(DocumentStream(sources, [1, 2, 1, 1, 1, 3]), 48, pad_id=tokenizer.pad_id, lookahead=7)

    packer, resumed = open_packer(), open_packer()
    packer.next_rows(9)
    resumed.load_state_dict(json.loads(json.dumps(packer.state_dict())))
    ours, theirs = packer.next_rows(12), resumed.next_rows(12)
    assert ours.tokens_RL.tolist() == theirs.tokens_RL.tolist()
    assert ours.ordinal_RL.tolist() == theirs.ordinal_RL.tolist()
    assert ours.epoch_RL.tolist() == theirs.epoch_RL.tolist()


def test_problems_are_new_in_every_pass_and_take_turns(tokenizer):
    source = open_source(problems(Path()), tokenizer, 1)
    taken = [text for _, text in take(tokenizer, source, 2 * NUM_RECORDS)]
    assert len(set(taken)) == 2 * NUM_RECORDS
    assert ["arithmetic" in text for text in taken[:6]] == [True, False] * 3
    other = take(tokenizer, open_source(problems(Path()), tokenizer, 2), NUM_RECORDS)
    assert not {text for _, text in other} & set(taken)


def test_problem_is_prompt_and_answer(tokenizer):
    config = SourceConfig(kind="reasoning_gym", families={"chain_sum": {"min_terms": 2, "max_terms": 2}}, chat=False)
    document = open_source(config, tokenizer, 1).next_document()
    prompt = tokenizer.decode(document.tokens[~document.maskable])
    left, sign, right = prompt.split(": ")[1].removesuffix(" =").split()
    value = int(left) + int(right) if sign == "+" else int(left) - int(right)
    assert tokenizer.decode(document.tokens[document.maskable]) == str(value)


def test_file_pattern_and_single_file(tmp_path, tokenizer):
    write_jsonl(tmp_path / "a1.jsonl", records(0, 2))
    write_jsonl(tmp_path / "a2.jsonl", records(2, 3))
    write_jsonl(tmp_path / "b.jsonl", records(3, 9))
    for path, count in (("a*.jsonl", 3), ("b.jsonl", 6), ("**/*.jsonl", 9)):
        source = open_source(SourceConfig(kind="jsonl", path=str(tmp_path / path)), tokenizer, 0)
        assert source.num_documents == count


def test_blank_lines_and_windows_line_ends(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_bytes(b'\n{"text": "one"}\r\n  \r\n{"text": "two"}')
    source = open_source(SourceConfig(kind="jsonl", path=str(tmp_path), shuffle=False), tokenizer, 0)
    assert take(tokenizer, source, 3) == [(0, "one"), (0, "two"), (1, "one")]


def test_conversations_in_parquet(tmp_path, tokenizer):
    turns = [{"role": "user", "content": "q", "name": None}, {"role": "assistant", "content": "a", "name": None}]
    write_parquet(tmp_path / "a.parquet", [{"messages": turns, "prompt": "unused"}])
    for kind in ("parquet", "huggingface"):
        document = open_source(SourceConfig(kind=kind, path=str(tmp_path)), tokenizer, 0).next_document()
        assert tokenizer.decode(document.tokens[document.maskable], skip_special=False) == "a<|im_end|>"


PREFERENCES = [{"prompt": "q", "chosen": "good" * (n + 1), "rejected": "bad", "id": n} for n in range(5)]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "huggingface"])
def test_preferences_become_pairs_or_their_chosen_sides(tmp_path, tokenizer, kind):
    write = write_jsonl if kind == "jsonl" else write_parquet
    write(tmp_path / f"a.{'jsonl' if kind == 'jsonl' else 'parquet'}", PREFERENCES)
    config = SourceConfig(kind=kind, path=str(tmp_path), shuffle=False)
    source = open_source(config, tokenizer, 0, pairs=True)
    documents = [source.next_document() for _ in PREFERENCES]
    answers = [tokenizer.decode(document.tokens[document.maskable]) for document in documents]
    assert answers == ["good" * (n + 1) for n in range(5)]
    for document in documents:
        assert document.rejected is not None
        assert tokenizer.decode(document.rejected.tokens[document.rejected.maskable]) == "bad"
    alone = open_source(config, tokenizer, 0)
    for document in documents:
        chosen = alone.next_document()
        assert chosen.rejected is None
        assert chosen.tokens.tolist() == document.tokens.tolist()
    packer = PairPacker(DocumentStream([open_source(config, tokenizer, 0, pairs=True)], epochs=2), 64, pad_id=0)
    assert packer.next_rows(100).num_rows == 20


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "huggingface"])
def test_conversations_with_tools_from_every_kind_of_file(tmp_path, tokenizer, kind):
    call = json.dumps({"name": "add", "arguments": {"a": 1}})
    conversation = [{"from": "human", "value": "q"}, {"from": "function_call", "value": call}]
    conversation += [{"from": "observation", "value": "1"}, {"from": "gpt", "value": "one"}]
    record = {"conversations": conversation, "tools": json.dumps([{"name": "add"}])}
    write = write_jsonl if kind == "jsonl" else write_parquet
    write(tmp_path / "data" / f"a.{'jsonl' if kind == 'jsonl' else 'parquet'}", [record])
    template = (
        "{{ tools | tojson }}{% for m in messages %}{{ '<|im_start|>' + m.role + (m.content or '') }}"
        "{% for call in m.tool_calls or [] %}{{ call.function.name + '!' }}{% endfor %}{{ '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
    )
    tokenizer = make_tokenizer(tmp_path / "tokenizer", chat_template=template)
    document = open_source(SourceConfig(kind=kind, path=str(tmp_path / "data")), tokenizer, 0).next_document()
    assert tokenizer.decode(document.tokens) == '[{"name": "add"}]userqassistantadd!tool1assistantone'
    assert tokenizer.decode(document.tokens[document.maskable], skip_special=False) == "add!<|im_end|>one<|im_end|>"


def test_record_that_is_no_preference_is_found_when_pairs_are_opened(tmp_path, tokenizer):
    write_jsonl(tmp_path / "a.jsonl", [PREFERENCES[0], {"prompt": "q", "response": "r"}])
    config = SourceConfig(kind="jsonl", path=str(tmp_path))
    with refused(DataError, "a.jsonl line 2", "chosen", "prompt"):
        open_source(config, tokenizer, 0, pairs=True)
    write_jsonl(tmp_path / "a.jsonl", [PREFERENCES[0], {"prompt": "q", "chosen": "a", "rejected": "a"}])
    with refused(DataError, "a.jsonl line 2", "chosen", "rejected"):
        open_source(config, tokenizer, 0, pairs=True)
    open_source(config, tokenizer, 0)
    for other in (problems(tmp_path), SourceConfig(kind="text", path=str(tmp_path))):
        with refused(ConfigError, other.kind, "preferences", "jsonl", "parquet", "huggingface"):
            open_source(other, tokenizer, 0, pairs=True)


def test_fill_is_the_sources_own_or_else_the_callers(tmp_path, tokenizer):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    config = SourceConfig(kind="jsonl", path=str(tmp_path))
    lengths = [
        len(open_source(config.model_copy(update={"eos_fill": own}), tokenizer, 0, eos_fill=fill).next_document())
        for own, fill in ((None, None), (None, 8), (16, 8), (16, None))
    ]
    assert lengths == [2, 8, 16, 16]


def test_options_reach_the_documents(tmp_path, tokenizer):
    write_jsonl(tmp_path / "a.jsonl", [{"q": "2 + 3", "a": "5"}])
    names = {"prompt_field": "q", "response_field": "a", "path": str(tmp_path), "kind": "jsonl"}
    document = open_source(SourceConfig(**names, chat=False, supervise="all", eos_fill=16), tokenizer, 0).next_document()
    assert len(document) == 16
    assert document.maskable.all()
    assert tokenizer.decode(document.tokens) == "2 + 35"


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (b'{"text": "a"}\n\n{"text": \n', ("data.jsonl line 3", "JSON")),
        (b'{"text": "a"}\n[1]\n', ("data.jsonl line 2", "list")),
        (b'{"text": "a"}\n{"body": "b"}\n', ("data.jsonl line 2", "text", "body")),
        (
            b'{"text": "a"}\n{"messages": [{"role": "user", "content": "q"}, {"role": "bot", "content": "a"}]}\n',
            ("data.jsonl line 2", "field messages", "message 2", "role", "'bot'"),
        ),
        (b'{"text": "\xff"}\n', ("data.jsonl line 1", "JSON")),
        (b"\n\n", ("data.jsonl", "records", 0)),
    ],
)
def test_bad_lines_are_found_when_the_source_is_opened(tmp_path, tokenizer, content, names):
    file = tmp_path / "data.jsonl"
    file.write_bytes(content)
    with refused(DataError, *names):
        open_source(SourceConfig(kind="jsonl", path=str(file)), tokenizer, 0)


def test_bad_parquet(tmp_path, tokenizer):
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    config = SourceConfig(kind="parquet", path=str(tmp_path / "a.parquet"))
    with refused(DataError, "a.parquet"):
        open_source(config, tokenizer, 0)
    write_parquet(tmp_path / "a.parquet", [{"body": "x", "id": 1}])
    with refused(DataError, "text", "messages", "body", "id"):
        open_source(config, tokenizer, 0)
    write_parquet(tmp_path / "a.parquet", [{"text": "x"}, {"text": None}])
    source = open_source(config.model_copy(update={"shuffle": False}), tokenizer, 0)
    source.next_document()
    with refused(DataError, "a.parquet row 2", "text"):
        source.next_document()


@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet"])
def test_data_that_is_not_there(tmp_path, tokenizer, kind):
    with refused(DataError, tmp_path / "none*"):
        open_source(SourceConfig(kind=kind, path=str(tmp_path / "none*")), tokenizer, 0)
    with refused(DataError, tmp_path, "file"):
        open_source(SourceConfig(kind=kind, path=str(tmp_path)), tokenizer, 0)


def test_text_that_is_empty_or_not_utf8(tmp_path, tokenizer):
    file = tmp_path / "a.txt"
    file.write_text("")
    with refused(DataError, "records", 0):
        open_source(SourceConfig(kind="text", path=str(file)), tokenizer, 0)
    file.write_bytes(b"caf\xe9")
    with refused(DataError, "a.txt", "UTF-8"):
        open_source(SourceConfig(kind="text", path=str(file)), tokenizer, 0).next_document()


def test_bad_hub_datasets(tmp_path, tokenizer):
    with refused(DataError, tmp_path / "none"):
        open_source(SourceConfig(kind="huggingface", path=str(tmp_path / "none")), tokenizer, 0)
    write_jsonl(tmp_path / "data" / "a.jsonl", [{"body": "x"}])
    config = SourceConfig(kind="huggingface", path=str(tmp_path / "data"))
    with refused(DataError, "nowhere"):
        open_source(config.model_copy(update={"split": "nowhere"}), tokenizer, 0)
    with refused(DataError, "shard 0 window 0 record 0", "text", "body"):
        open_source(config, tokenizer, 0).next_document()


def test_state_of_other_data_is_refused(tmp_path, tokenizer):
    write_jsonl(tmp_path / "a.jsonl", records(0, 3))
    config = SourceConfig(kind="jsonl", path=str(tmp_path))
    state = open_source(config, tokenizer, 0).state_dict()
    write_jsonl(tmp_path / "a.jsonl", records(0, 4))
    with refused(DataError, "documents", 4, 3):
        open_source(config, tokenizer, 0).load_state_dict(state)
    hub = hub_jsonl_folder(tmp_path / "hub")
    state = open_source(hub, tokenizer, 0).state_dict()
    with refused(DataError, "window_size", 4, 3):
        open_source(hub.model_copy(update={"shuffle_window": 4}), tokenizer, 0).load_state_dict(state)
    state = open_source(problems(tmp_path), tokenizer, 0).state_dict()
    other = problems(tmp_path).model_copy(update={"items_per_epoch": 4})
    with refused(DataError, "documents", 4, 11):
        open_source(other, tokenizer, 0).load_state_dict(state)
    with refused(DataError, "reasoning_gym"):
        open_source(problems(tmp_path), tokenizer, 1).load_state_dict(state)


@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet", "huggingface"])
def test_state_of_edited_data_of_the_same_length_is_refused(tmp_path: Path, tokenizer: Tokenizer, kind: Any) -> None:
    """Moving or copying the data changes nothing; a letter in any of the files does."""
    suffix = {"text": "txt", "huggingface": "jsonl"}.get(kind, kind)

    def write(texts: tuple[str, str]) -> None:
        for name, text in zip("ab", texts, strict=True):
            file = tmp_path / f"{name}.{suffix}"
            if kind == "text":
                file.write_text(text)
            elif kind == "parquet":
                pq.write_table(pa.table({"text": [text]}), file)
            else:
                write_jsonl(file, [{"text": text}])

    def source() -> Source:
        return open_source(SourceConfig(kind=kind, path=str(tmp_path)), tokenizer, 0)

    write(("the fox", "the dog"))
    state = json.loads(json.dumps(source().state_dict()))
    write(("the fox", "the dog"))
    source().load_state_dict(state)
    write(("the fox", "the doe"))
    with refused(DataError, tmp_path, "content"):
        source().load_state_dict(state)
