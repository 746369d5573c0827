"""Several servers are one: scores do not depend on which of them is asked, and one that fails is missed by nobody."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
from faulty_server import INFO, LIMITS, Answer, FaultyServer, error, json_answer
from remote_tools import EXPECTED, PIXELS, PROMPTS, FakeTime, means, pool_of

from calibri_lightning.errors import UserError
from calibri_lightning.prompts import Prompt
from calibri_lightning.remote.errors import RemoteError
from calibri_lightning.remote.pool import Patience
from calibri_lightning.remote.wire import Batch
from calibri_lightning.serving.protocol import Health


@pytest.fixture
def servers() -> Iterator[list[FaultyServer]]:
    with ExitStack() as stack:
        yield [stack.enter_context(FaultyServer()) for _ in range(3)]


def scored(servers: list[FaultyServer]) -> list[int]:
    return [server.scored for server in servers]


def test_the_first_of_equally_free_servers_is_asked(servers: list[FaultyServer]) -> None:
    pool = pool_of(*servers)
    for _ in range(4):
        assert means(pool) == EXPECTED
    assert scored(servers) == [4, 0, 0]


def test_the_server_with_the_least_to_do_is_asked(servers: list[FaultyServer]) -> None:
    pool = pool_of(*servers)
    gate = threading.Event()
    for server in servers:
        server.next(lambda s, body: Answer(body=json_answer(s.reply(body)).body, wait_for=gate))
    with ThreadPoolExecutor(3) as threads:
        pending = [threads.submit(means, pool) for _ in range(3)]
        while sum(scored(servers)) < 3:
            threading.Event().wait(0.005)
        assert scored(servers) == [1, 1, 1]
        gate.set()
        assert [p.result() for p in pending] == [EXPECTED] * 3


@pytest.mark.parametrize("fault", [Answer(reset=True), error(503), error(429), Answer(body=b"garbage"), Answer(204)])
def test_a_batch_that_failed_is_scored_by_another_server_without_waiting(
    servers: list[FaultyServer], fault: Answer
) -> None:
    pool = pool_of(*servers, time=(clock := FakeTime()))
    servers[0].next(fault)
    assert means(pool) == EXPECTED
    assert means(pool) == EXPECTED
    assert scored(servers) == [1, 2, 0]
    assert clock.slept == []
    # Its time to return comes, and it answers its probe.
    clock.now += 60
    assert means(pool) == EXPECTED
    assert scored(servers) == [2, 2, 0]


def test_a_slow_batch_goes_to_another_server(servers: list[FaultyServer]) -> None:
    pool = pool_of(*servers, timeout=0.2)
    late = threading.Event()
    servers[0].next(Answer(wait_for=late))
    assert means(pool) == EXPECTED
    late.set()
    assert scored(servers) == [1, 1, 0]


def test_a_batch_that_all_servers_answer_with_garbage_is_given_up(servers: list[FaultyServer]) -> None:
    pool = pool_of(*servers)
    for server in servers:
        server.next(Answer(body=b"garbage"))
    with pytest.raises(RemoteError, match=r"sent 3 times.*; then .*; then ") as caught:
        means(pool)
    assert all(server.url in str(caught.value) for server in servers)
    assert scored(servers) == [1, 1, 1]


def test_what_a_reward_raised_is_not_passed_on_but_its_server_rests(servers: list[FaultyServer]) -> None:
    pool = pool_of(*servers)
    servers[0].next(error(500, "out of memory"))
    with pytest.raises(RemoteError, match="out of memory"):
        means(pool)
    assert means(pool) == EXPECTED
    assert scored(servers) == [1, 1, 0]


def test_a_request_that_breaks_the_rules_costs_no_server_its_place(servers: list[FaultyServer]) -> None:
    pool = pool_of(*servers)
    servers[0].next(error(422))
    with pytest.raises(RemoteError, match="422"):
        means(pool)
    assert means(pool) == EXPECTED
    assert scored(servers) == [2, 0, 0]


def test_a_server_stays_out_until_its_probe_is_answered(servers: list[FaultyServer]) -> None:
    pool = pool_of(*servers[:2], time=(clock := FakeTime()))
    servers[0].next(error(503))
    assert means(pool) == EXPECTED
    probes = servers[0].asked["/health"]
    servers[0].next(json_answer(Health(status="loading")), error(500), Answer(body=b"?"), path="/health")
    for _ in range(3):
        clock.now += 60
        assert means(pool) == EXPECTED
    assert scored(servers) == [1, 4, 0]
    assert servers[0].asked["/health"] == probes + 3
    clock.now += 60
    assert means(pool) == EXPECTED
    assert scored(servers) == [2, 4, 0]


def test_one_that_serves_something_else_by_now_stays_out_while_others_are_left(servers: list[FaultyServer]) -> None:
    pool = pool_of(*servers[:2], time=(clock := FakeTime()))
    servers[0].info = INFO.model_copy(update={"revision": "2"})
    for _ in range(3):
        assert means(pool) == EXPECTED
        clock.now += 60
    assert scored(servers) == [1, 3, 0]


def test_with_all_down_the_error_names_each_and_why(servers: list[FaultyServer]) -> None:
    pool = pool_of(*servers[:2], patience=Patience(recovery=20.0))
    for server in servers[:2]:
        server.kill()
    with pytest.raises(RemoteError, match="Connection refused") as caught:
        means(pool)
    assert all(str(caught.value).count(f"{server.url}: ") == 1 for server in servers[:2])


def test_eight_threads_get_their_own_scores_while_servers_fail(servers: list[FaultyServer]) -> None:
    clock = FakeTime(on_sleep=lambda: threading.Event().wait(0.001))
    pool = pool_of(*servers, time=clock, patience=Patience(recovery=1e9))
    faults = []
    for number, server in enumerate(servers):
        # Three faults in all: no batch can meet a fourth.
        server.next(*[FaultyServer.right_scores] * number, lambda *_: faults.append(503) or error(503))
    batches = [tuple(Prompt("y" * (7 * i + j), j) for j in range(4)) for i in range(40)]
    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(lambda prompts: pool.score(PIXELS, prompts).scores["mean"].tolist(), batches))
    for i, result in enumerate(results):
        assert result == pytest.approx([expected + 7 * i for expected in EXPECTED], abs=1e-9)
    assert faults
    assert sum(scored(servers)) == 40 + len(faults)
    assert all(entry.outstanding == 0 for entry in pool._servers)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"revision": "2"}, "differs from that of the servers before it.*revision '2' instead of '1'"),
        ({"model": "other"}, "model 'other' instead of 'tests:mean'"),
        ({"preprocessing": "crop"}, "preprocessing 'crop'"),
        ({"name": "median"}, "it offers 'median' and no 'mean'. Give its name on the server as the option `reward`"),
    ],
)
def test_servers_that_do_not_score_the_same_are_refused(change: dict[str, str], message: str) -> None:
    with (
        FaultyServer() as first,
        FaultyServer(INFO.model_copy(update=change)) as second,
        pytest.raises(UserError, match=f"The server {second.url} cannot be used: .*{message}"),
    ):
        pool_of(first, second)


def test_a_server_that_loads_is_waited_for_and_not_forever() -> None:
    with FaultyServer() as server:
        server.next(*[json_answer(Health(status="loading")), error(503)] * 5, path="/health")
        pool = pool_of(server, time=(clock := FakeTime()))
        assert len(clock.slept) == 10
        assert means(pool) == EXPECTED
        server.next(*[json_answer(Health(status="loading"))] * 99, path="/health")
        with pytest.raises(UserError, match=r"not ready after 30 s: it is loading. .* raise startup_timeout"):
            pool_of(server, patience=Patience(startup=30))


def test_a_server_that_cannot_be_reached_at_the_start_is_told_within_seconds() -> None:
    with FaultyServer() as server:
        pass
    clock = FakeTime()
    with pytest.raises(UserError, match=r"No server of rewards can be reached at http:.*Connection refused.*serve"):
        pool_of(server, time=clock)
    assert clock.now <= 10


@pytest.mark.parametrize(
    ("fault", "path", "message"),
    [
        (Answer(body=b"<html>"), "/health", "cannot be used: the reply is no Health"),
        (Answer(body=b'{"protocol": 9, "status": "ready"}'), "/health", "it speaks version 9 of the protocol"),
        (Answer(body=b'{"rewards": 1}'), "/v1/rewards", "cannot be used: the reply is no Roster"),
        (error(500), "/v1/rewards", "cannot be asked what it serves: .* 500"),
        (error(404), "/health", "answered with 404"),
        (Answer(301), "/health", "was redirected"),
    ],
)
def test_what_is_no_server_of_rewards_is_told_at_the_start(fault: Answer, path: str, message: str) -> None:
    with FaultyServer() as server:
        server.next(fault, path=path)
        with pytest.raises(UserError, match=message):
            pool_of(server)
        assert server.asked[path] == 1


def test_prompts_are_checked_by_a_server_that_answers(servers: list[FaultyServer]) -> None:
    pool = pool_of(*servers)
    servers[0].next(error(503), path="/v1/check")
    pool.check(PROMPTS)
    assert [server.asked["/v1/check"] for server in servers] == [1, 1, 0]
    with pytest.raises(UserError, match="The server refuses the prompts for 'mean': no score for 'forbidden'"):
        pool.check([Prompt("forbidden", 0)])


def test_the_strictest_server_decides_how_batches_are_cut() -> None:
    with FaultyServer() as wide, FaultyServer(limits=LIMITS.model_copy(update={"items": 3})) as narrow:
        pool = pool_of(wide, narrow)
        assert pool._wire.most_items(Batch(PIXELS, PROMPTS)) == 3
