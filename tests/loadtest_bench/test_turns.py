"""Who runs when, and what becomes of a system that fails."""

from fusionserve.loadtest.bench import turns
from fusionserve.loadtest.bench.protocol import BASE, MIXED, Job, Outcome
from fusionserve.loadtest.bench.system_process import SystemFailedError
from fusionserve.loadtest.bench.turns import Contestant, take_turns
from fusionserve.loadtest.bench.workloads import BenchWorkload

WORKLOAD = BenchWorkload(name="tiny", shape="none", num_streams=2, prompt_tokens=3, new_tokens=1)


class FakeProcess:
    """Notes the jobs of all in one list and fails at its n-th."""

    def __init__(self, name: str, log: list[tuple[str, Job]], fails_at: int = 99) -> None:
        self.name, self.log, self.fails_at, self.num_jobs = name, log, fails_at, 0

    def run(self, job: Job) -> Outcome:
        self.num_jobs += 1
        if self.num_jobs == self.fails_at:
            raise SystemFailedError("ran out of luck")
        self.log.append((self.name, job))
        return Outcome(0.5, 1.0, [[1], [1]])


def test_everyone_gets_the_same_prompts_in_turns_that_turn_round() -> None:
    log: list[tuple[str, Job]] = []
    both = {name: Contestant(FakeProcess(name, log), (BASE, MIXED)) for name in ("one", "two")}
    begun: list[int] = []
    rounds = take_turns(both, WORKLOAD, 1, begun.append)
    order = [("one", BASE), ("two", BASE), ("one", MIXED), ("two", MIXED)]
    assert [(name, job.kind) for name, job in log] == order + order[::-1]
    assert begun == [0, 1]
    prompts = [tuple(map(tuple, job.prompts)) for _, job in log]
    assert len(set(prompts)) == 4  # two kinds in two repeats
    assert prompts[0] == prompts[1]
    assert {len(each) for each in rounds.outcomes.values()} == {1}


def test_a_system_that_fails_leaves_the_run_and_the_tables() -> None:
    log: list[tuple[str, Job]] = []
    weak, strong = FakeProcess("weak", log, fails_at=3), FakeProcess("strong", log)
    rounds = take_turns(
        {"weak": Contestant(weak, (BASE,)), "strong": Contestant(strong, (BASE,))},
        WORKLOAD,
        3,
        lambda _: None,
    )
    assert rounds.failures == {"weak": "base: ran out of luck"}
    assert set(rounds.outcomes) == {("strong", BASE)}
    assert (weak.num_jobs, strong.num_jobs) == (3, 4)


def test_kinds_that_a_system_cannot_run_are_left_out() -> None:
    log: list[tuple[str, Job]] = []
    take_turns({"one": Contestant(FakeProcess("one", log), (MIXED,))}, WORKLOAD, 0, lambda _: None)
    assert [job.kind for _, job in log] == [MIXED]
    assert turns.KINDS[0] == BASE
