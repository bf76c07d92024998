"""Which sequences are scheduled, in which order, with how many cache blocks; on sequences that need no model."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiny import MASK, request_of
from unmask.diffusion.decode import Guess
from unmask.engine.kv_cache import BlockPool
from unmask.engine.request import Request
from unmask.engine.scheduler import STEPS_PER_PRIORITY, Scheduler
from unmask.engine.sequences.base import ModelOutput, ScheduledSequence
from unmask.engine.sequences.block_diffusion import BlockDiffusionSequence

SIZE = 4


class Bench:
    """A scheduler whose sequences decide token 1 everywhere: time passes without a model."""

    def __init__(
        self,
        num_cache_blocks: int,
        *,
        max_num_seqs: int = 16,
        max_num_batched_tokens: int = 512,
        prefill_chunk: int = 512,
        prefix_cache: bool = False,
    ) -> None:
        self.pool = BlockPool(num_cache_blocks)
        self.scheduler = Scheduler(
            self.pool,
            SIZE,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            prefill_chunk=prefill_chunk,
            prefix_cache=prefix_cache,
        )
        self.sequences: list[BlockDiffusionSequence] = []
        self.log: list[list[int]] = []

    def add(self, request: Request) -> BlockDiffusionSequence:
        sequence = BlockDiffusionSequence(request, len(self.sequences), MASK, SIZE)
        self.sequences.append(sequence)
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> list[tuple[int, ScheduledSequence]]:
        """One forward; who had rows in it."""
        work = self.scheduler.schedule()
        rows = 0
        for sequence, plan in work:
            assert isinstance(sequence, BlockDiffusionSequence)
            assert len(sequence.block_table) * SIZE >= plan.stop, "tokens without a cache block"
            assert 0 <= plan.start < plan.stop
            rows += plan.stop - plan.start
            count = len(plan.queries)
            answer = ModelOutput(Guess(plan.queries, [1] * count, [0.5] * count), None) if count else None
            sequence.apply(plan, answer)
            self.scheduler.publish(sequence)
            if sequence.completion is not None:
                self.scheduler.remove(sequence)
        assert rows <= self.scheduler.max_num_batched_tokens, "over budget"
        assert len(self.scheduler.running) <= self.scheduler.max_num_seqs
        written = [cache_block for s in self.scheduler.running for cache_block in s.block_table[s.num_published :]]
        assert len(written) == len(set(written)), "two sequences write one cache block"
        self.pool.check()
        self.log.append([sequence.number for sequence, _ in work])
        return [(sequence.number, plan) for sequence, plan in work]

    def finish(self, limit: int = 2000) -> list[int]:
        """Run to the end; numbers in the order in which they ended."""
        ended: list[int] = []
        for _ in range(limit):
            if not (self.scheduler.running or self.scheduler.waiting):
                assert self.pool.num_used == 0
                return ended
            self.step()
            ended += [s.number for s in self.sequences if s.completion is not None and s.number not in ended]
        raise AssertionError("somebody starved")


def test_first_come_first_served() -> None:
    bench = Bench(100, max_num_seqs=1)
    for n in range(5):
        bench.add(request_of(3, 6, start=n))
    assert bench.finish() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("priority", "offset", "first"), [(1, -1, 1), (1, 0, 0), (1, 1, 0), (-1, 64, 0), (2, -1, 1), (2, 0, 0)]
)
def test_a_priority_is_worth_a_number_of_steps(priority: int, offset: int, first: int) -> None:
    """Request 0 has a priority, request 1 comes so many steps and an offset after it; of two equals the older is the first."""
    late = max(0, priority * STEPS_PER_PRIORITY + offset)
    bench = Bench(100, max_num_seqs=1)
    bench.add(request_of(2, 118, start=9))
    bench.add(request_of(2, 118, start=10, priority=-1))
    bench.step()
    one = bench.add(request_of(3, 2, priority=priority))
    for _ in range(late):
        bench.step()
    two = bench.add(request_of(3, 2, start=1))
    ended = bench.finish()
    order = sorted((one.number, two.number), key=ended.index)
    assert order[0] == (one.number, two.number)[first]


def test_the_important_come_first() -> None:
    bench = Bench(100, max_num_seqs=1)
    for n, priority in enumerate((0, 2, -1, 0, -2)):
        bench.add(request_of(3, 2, priority=priority, start=n))
    assert bench.finish() == [4, 2, 0, 3, 1]


def test_a_priority_does_not_interrupt_whoever_runs() -> None:
    bench = Bench(100, max_num_seqs=1)
    bench.add(request_of(3, 9))
    bench.step()
    bench.add(request_of(3, 9, priority=-5))
    assert bench.finish() == [0, 1]
    assert bench.sequences[0].preemptions == 0


def test_the_least_recently_served_come_first() -> None:
    """Three run, and then there is room for one: they take turns, the oldest first."""
    bench = Bench(100, max_num_batched_tokens=3 * SIZE)
    for n in range(3):
        bench.add(request_of(1, 90, start=n))
    bench.step()
    bench.scheduler.max_num_batched_tokens = SIZE
    turns = [bench.step() for _ in range(6)]
    assert all(len(turn) == 1 for turn in turns)
    numbers = [number for ((number, _),) in turns]
    assert numbers[:3] == numbers[3:] == [0, 1, 2]


def test_those_that_run_come_before_those_that_wait() -> None:
    bench = Bench(100, max_num_batched_tokens=2 * SIZE)
    for n in range(3):
        bench.add(request_of(1, 3, start=n))
    assert bench.finish() == [0, 1, 2]
    assert not any(2 in numbers and {0, 1} & set(numbers) for numbers in bench.log)


def test_long_prompts_are_prefilled_in_parts_and_let_others_through() -> None:
    bench = Bench(100, max_num_batched_tokens=4 * SIZE)
    bench.add(request_of(2, 30, start=1))
    bench.step()
    bench.add(request_of(16 * SIZE, 3))
    plans = []
    for _ in range(8):
        plans.append(dict(bench.step()))
    assert all(0 in plan for plan in plans), "decoding goes on"
    parts = [plan[1] for plan in plans if 1 in plan]
    prefill = [part for part in parts if not part.queries]
    assert len(prefill) >= 5
    assert [part.start for part in parts[1:6]] == [part.stop for part in parts[:5]], "each part begins where the last ended"
    assert all((part.stop - part.start) % SIZE == 0 for part in prefill)


def test_a_long_prompt_takes_a_part_of_each_step_beside_those_that_decode() -> None:
    bench = Bench(100, prefill_chunk=2 * SIZE)
    bench.add(request_of(2, 60, start=1))
    bench.step()
    bench.add(request_of(24 * SIZE, 3))
    steps = [dict(bench.step()) for _ in range(10)]
    for plans in steps:
        assert plans[0].queries, "decoding goes on"
        assert plans[1].stop - plans[1].start <= 4 * SIZE, "at most two tokens for each that decodes, a block and its commit"
    bench.finish()
    alone = Bench(100, prefill_chunk=2 * SIZE)
    alone.add(request_of(24 * SIZE, 3))
    (plan,) = dict(alone.step()).values()
    assert plan.stop == 8 * SIZE, "alone it takes more, and not all"


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    bench = Bench(200, prefill_chunk=2 * SIZE)
    long = bench.add(request_of(100 * SIZE, 3))
    bench.step()
    short = bench.add(request_of(3 * SIZE, 3, start=1))
    for _ in range(3):
        bench.step()
    assert short.forwards > 0
    assert bench.finish() == [1, 0]
    assert long.forwards <= 40


def test_prefill_is_shared_between_the_oldest_and_the_shortest() -> None:
    """Two long prompts both get on; short ones that keep coming do not stop the oldest."""
    bench = Bench(400, prefill_chunk=2 * SIZE)
    old, new = bench.add(request_of(80 * SIZE, 3)), bench.add(request_of(80 * SIZE, 3, start=1))
    for n in range(12):
        before = old.committed
        bench.step()
        assert old.committed >= before + SIZE
        bench.add(request_of(6 * SIZE, 1, start=2 + n))
    assert old.committed >= new.committed > 0
    bench.finish()


def test_samples_of_a_prompt_wait_until_it_is_cached() -> None:
    bench = Bench(100, prefill_chunk=2 * SIZE, prefix_cache=True)
    request = request_of(20 * SIZE, 3)
    first, *others = [bench.add(replace(request, sample=n)) for n in range(4)]
    other = bench.add(request_of(2 * SIZE, 3, start=7))
    bench.step()
    assert {s.number for s in bench.scheduler.running} == {first.number, other.number}
    bench.finish()
    assert all(sample.cached_tokens >= 10 * SIZE for sample in others)


def test_aborted_prefill_frees_its_cache_blocks() -> None:
    """Those that it shares with another stay that one's."""
    bench = Bench(100, prefill_chunk=2 * SIZE, prefix_cache=True)
    first = bench.add(request_of(20 * SIZE, 3))
    while first.committed < 20 * SIZE:
        bench.step()
    second = bench.add(replace(request_of(20 * SIZE, 3), ids=(*first.request.ids, *range(5, 45))))
    bench.step()
    shared = first.block_table[0]
    assert second.is_prefilling
    assert bench.pool.ref_count(shared) == 2
    bench.scheduler.remove(second)
    bench.pool.check()
    assert bench.pool.ref_count(shared) == 1
    assert bench.pool.num_used == len(first.block_table)
    bench.scheduler.remove(first)
    assert bench.pool.num_used == 0


def test_admission_waits_for_cache_blocks() -> None:
    bench = Bench(5)
    bench.add(request_of(3 * SIZE - 1, 1))
    bench.add(request_of(3 * SIZE - 1, 1, start=1))
    work = bench.scheduler.schedule()
    assert [sequence.number for sequence, _ in work] == [0]
    assert [s.number for s in bench.scheduler.waiting] == [1]
    assert bench.pool.num_used == 3
    assert bench.sequences[1].committed == 0
    bench.scheduler.remove(bench.sequences[0])
    assert [number for number, _ in bench.step()] == [1], "the cache blocks came back with the end of the first"


def test_nobody_overtakes_a_request_that_waits_for_cache_blocks() -> None:
    bench = Bench(5)
    bench.add(request_of(3 * SIZE - 1, 9))
    bench.add(request_of(4 * SIZE - 1, 1, start=1))
    bench.add(request_of(1, 1, start=2))
    assert bench.finish() == [0, 1, 2]
    first = {number: next(i for i, numbers in enumerate(bench.log) if number in numbers) for number in range(3)}
    assert first[0] < first[1] <= first[2], "there was room for the last one all the time"


def test_preemption_takes_the_newest_and_keeps_what_it_decided() -> None:
    """Three sequences of one cache block, room for four: when two need a second one, the newest gives up its own."""
    bench = Bench(4)
    old, middle, new = (bench.add(request_of(1, 11, start=n)) for n in range(3))
    for _ in range(3):
        bench.step()
    assert [len(s.block_table) for s in (old, middle, new)] == [1, 1, 1]
    decided = [(p, t) for p, t in enumerate(new.tokens) if not new.undecided[p]]
    assert len(decided) == 1 + 3
    bench.step()
    assert (old.preemptions, middle.preemptions, new.preemptions) == (0, 0, 1)
    assert new.block_table == []
    assert new.committed == 0
    assert [(p, new.tokens[p]) for p, _ in decided] == decided
    assert bench.scheduler.waiting == [new]
    assert bench.finish() == [0, 1, 2]
    assert all(s.completion is not None and s.completion.ids == (1,) * 11 for s in bench.sequences)


def test_whoever_has_rows_in_the_forward_is_not_preempted() -> None:
    """The newest was served first in this forward: the older one has to wait a step."""
    bench = Bench(3)
    old, new = bench.add(request_of(1, 11)), bench.add(request_of(1, 11, start=1))
    for _ in range(3):
        bench.step()
    old.last_served, new.last_served = 3, 1
    assert [number for number, _ in bench.step()] == [1]
    assert (old.preemptions, new.preemptions) == (0, 0)
    assert next(number for number, _ in bench.step()) == 0
    assert new.preemptions == 1
    assert bench.finish() == [0, 1]


def test_a_preempted_sequence_finds_its_cache_blocks_again() -> None:
    """What it had published stays cached while there is room: prefix caching makes interruptions cheap."""
    bench = Bench(5, prefix_cache=True)
    bench.add(request_of(1, 11))
    new = bench.add(request_of(2 * SIZE + 1, 3, start=1))
    bench.step()
    before = list(new.block_table)
    bench.scheduler.preempt(new)
    assert bench.pool.num_used == 1
    bench.step()
    assert new.block_table[:2] == before[:2]
    assert new.committed >= 2 * SIZE
    assert new.cached_tokens == 0, "not counted as a hit"


REQUESTS = st.tuples(st.integers(1, 20), st.integers(1, 12), st.integers(-2, 2), st.integers(0, 2), st.integers(0, 3))


@settings(max_examples=60)
@given(
    st.lists(REQUESTS, min_size=1, max_size=12),
    st.integers(8, 20),
    st.integers(1, 4),
    st.integers(SIZE, 30),
    st.integers(1, 20),
    st.booleans(),
    st.lists(st.integers(0, 40), max_size=3),
)
def test_everybody_is_served_within_every_limit(
    shapes: list[tuple[int, int, int, int, int]],
    num_cache_blocks: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    prefill_chunk: int,
    prefix_cache: bool,
    aborts: list[int],
) -> None:
    """Random arrivals, priorities and aborts; `Bench.step` checks rows, cache blocks and books at every step."""
    bench = Bench(
        num_cache_blocks,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        prefill_chunk=prefill_chunk,
        prefix_cache=prefix_cache,
    )
    steps = 0
    for length, budget, priority, start, gap in shapes:
        bench.add(request_of(length, budget, priority=priority, start=start))
        for _ in range(gap):
            if bench.scheduler.running or bench.scheduler.waiting:
                bench.step()
                steps += 1
            if steps in aborts:
                alive = [*bench.scheduler.waiting, *bench.scheduler.running]
                if alive:
                    bench.scheduler.remove(alive[steps % len(alive)])
                    bench.pool.check()
    gone = {s.number for s in bench.sequences} - {s.number for s in (*bench.scheduler.waiting, *bench.scheduler.running)}
    bench.finish()
    for sequence in bench.sequences:
        assert sequence.completion is not None or sequence.number in gone
        if sequence.completion is not None:
            assert sequence.completion.ids == (1,) * sequence.request.params.max_new_tokens


def test_a_request_too_important_to_wait_still_waits_for_the_starving() -> None:
    """A stream of important newcomers delays an ordinary request by a bounded number of steps."""
    bench = Bench(100, max_num_seqs=1)
    bench.add(request_of(3, 5))
    ordinary = bench.add(request_of(3, 5, start=1))
    for n in range(60):
        bench.add(replace(request_of(3, 5, start=n % 50), priority=-1))
        for _ in range(5):
            bench.step()
        if ordinary.completion is not None:
            break
    assert ordinary.completion is not None
    assert bench.scheduler.clock <= STEPS_PER_PRIORITY + 20


def test_the_oldest_is_never_preempted() -> None:
    bench = Bench(6)
    sequences = [bench.add(request_of(1, 22, start=n)) for n in range(5)]
    assert bench.finish()[0] == 0
    assert sequences[0].preemptions == 0
    assert sum(sequence.preemptions for sequence in sequences) >= 3
