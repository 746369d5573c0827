"""Whatever a server does, the client ends with the right scores or the right error, having asked as often as it may."""

from __future__ import annotations

import json
import logging
import threading
from typing import Any

import numpy as np
import pytest
from faulty_server import Answer, Behaviour, FaultyServer, altered, error, json_answer
from remote_tools import EXPECTED, PIXELS, PROMPTS, FakeTime, means, pool_of

from calibri_lightning.errors import UserError
from calibri_lightning.remote.errors import POLICIES, RemoteError, sanitised
from calibri_lightning.remote.native import NativeWire
from calibri_lightning.remote.pool import ATTEMPTS, Patience, Pool
from calibri_lightning.remote.transport import Transport
from calibri_lightning.remote.urls import addresses
from calibri_lightning.remote.wire import HttpRequest
from calibri_lightning.serving.protocol import Health

EMPTY, RESET = Answer(raw=b""), Answer(reset=True)
CUT_SHORT = Answer(raw=b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{}")
CUT_CHUNK = Answer(raw=b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\n{}")
NO_HTTP = Answer(raw=b"garbage\r\n\r\n")


def swap(reply: dict[str, Any]) -> None:
    reply["results"].reverse()


def other_revision(reply: dict[str, Any]) -> None:
    reply["reward"]["revision"] = "2"


def other_protocol(reply: dict[str, Any]) -> None:
    reply["protocol"] = 2


def foreign_hash(reply: dict[str, Any]) -> None:
    reply["results"][0]["hash"] = "0" * 64


def of(key: str, value: object) -> Behaviour:
    """A reply whose first result has this."""
    return altered(lambda reply: reply["results"][0].update({key: value}))


def stale(server: FaultyServer, body: bytes) -> Answer:
    """The reply to the same pictures with other prompts."""
    request = json.loads(body)
    request["items"][0]["prompt"]["text"] = "another"
    return json_answer(server.reply(json.dumps(request).encode()))


def half(server: FaultyServer, body: bytes) -> Answer:
    right = json_answer(server.reply(body)).body
    return Answer(body=right[: len(right) // 2])


@pytest.mark.parametrize(
    "fault",
    [EMPTY, RESET, CUT_SHORT, CUT_CHUNK, NO_HTTP, error(429), error(502), error(503), error(504)],
    ids=["empty", "reset", "cut", "cut chunk", "no http", "429", "502", "503", "504"],
)
def test_what_may_pass_is_asked_again_and_four_times_at_most(fault: Answer) -> None:
    with FaultyServer() as server:
        pool = pool_of(server, time=(clock := FakeTime()))
        server.next(*[fault] * (ATTEMPTS - 1))
        assert means(pool) == EXPECTED
        assert server.scored == ATTEMPTS
        assert len(clock.slept) == ATTEMPTS - 1
        server.next(*[fault] * 9)
        with pytest.raises(RemoteError, match=r"sent 4 times and has no scores: POST http://127.0.0.1:\d+/v1/score"):
            means(pool)
        assert server.scored == 2 * ATTEMPTS


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (error(500, "CUDA error"), "answered with 500: CUDA error"),
        (error(501), "answered with 501"),
        (error(400), "answered with 400"),
        (error(413, "9 pixels"), "answered with 413: 9 pixels. The request is too large: start the server with higher"),
        (error(422, "no field x"), "answered with 422: no field x. The server does not understand"),
        (Answer(422, b'{"detail": "an answer of FastAPI"}'), "an answer of FastAPI"),
        (Answer(500, b"<html>\x00\x1b[31m oops"), "<html> \\[31m oops"),
        (Answer(500, b""), "nothing"),
        (Answer(500, b"x" * 10**6), "an unreadable body"),
        (Answer(204), "answered with 204"),
        (Answer(body=b"garbage"), "the reply is no ScoreReply .*Invalid JSON"),
        (Answer(body=b""), "the reply is no ScoreReply"),
        (Answer(body=b"[" * 10_000), "the reply is no ScoreReply"),
        (Answer(body=b"\xff\xfe{}"), "the reply is no ScoreReply"),
        (half, "the reply is no ScoreReply"),
        (json_answer(Health(status="ready")), "the reply is no ScoreReply"),
        (altered(lambda r: r["results"].pop()), "4 pictures were sent, but 3 were answered"),
        (altered(lambda r: r["results"].append(r["results"][0])), "4 pictures were sent, but 5 were answered"),
        (altered(swap), "the scores are in another order"),
        (altered(foreign_hash), "the scores are of other pictures or prompts"),
        (stale, "the scores are of other pictures or prompts"),
        (altered(other_revision), "another model than the run began with: revision '2' instead of '1'"),
        (of("scores", {"mean": 1.0}), "has the scores mean; the rule is mean, peak"),
        (of("scores", {"mean": 1.0, "peak": "NaN"}), "the reply is no ScoreReply"),
        (of("scores", {"mean": float("nan"), "peak": 1.0}), "the reply is no ScoreReply"),
        (of("scores", {"mean": 1e999, "peak": 1.0}), "the reply is no ScoreReply"),
        (of("surprise", 1), "the reply is no ScoreReply"),
        (Answer(body=b" " * (2**20 + 1)), "answered with more than 1048576 bytes"),
        (Answer(body=b"{}", headers={"Content-Encoding": "gzip"}), "a compressed reply"),
    ],
)
def test_what_will_not_pass_is_asked_once_and_its_error_says_what(fault: Any, message: str) -> None:
    with FaultyServer() as server:
        pool = pool_of(server)
        server.next(fault)
        with pytest.raises(RemoteError, match=message) as caught:
            means(pool)
        assert "sent once" in str(caught.value)
        assert len(str(caught.value)) < 1000
        assert server.scored == 1
        # And the next batch finds it well.
        assert means(pool) == EXPECTED


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (error(401), "answered with 401: no. The server wants its bearer token: .* token_env"),
        (error(403), "answered with 403: no. The server does not let this client in: check the token"),
        (error(404, "no such reward"), "answered with 404: no such reward. There is no such page: check the path"),
        (Answer(302, headers={"Location": "https://u:pw@x.org/login?key=k"}), r"redirected to https://x.org/login\. "),
        (Answer(307), "redirected to nowhere"),
        (altered(other_protocol), "it speaks version 2 of the protocol, this client version 1"),
    ],
)
def test_mistakes_of_the_configuration_end_the_run(fault: Answer, message: str) -> None:
    with FaultyServer() as server:
        pool = pool_of(server)
        server.next(fault)
        with pytest.raises(UserError, match=message) as caught:
            means(pool)
        assert not {"pw", "key=k"} & set(str(caught.value).split())
        assert server.scored == 1


def test_a_picture_without_a_score_is_nan_and_says_why() -> None:
    with FaultyServer() as server:
        pool = pool_of(server)
        server.next(altered(lambda r: r["results"][1].update(scores={"mean": None, "peak": 3.0}, error="no \x1b face")))
        scores = pool.score(PIXELS, PROMPTS)
        np.testing.assert_array_equal(scores.scores["mean"], [EXPECTED[0], np.nan, *EXPECTED[2:]])
        assert scores.scores["peak"][1] == 3.0
        assert scores.errors == {1: "no face"}
        server.next(of("scores", {"mean": None, "peak": None}))
        assert pool.score(PIXELS, PROMPTS).errors == {0: "the server gives no score under 'mean' and no reason"}


def test_a_slow_batch_is_not_sent_to_the_same_server_again() -> None:
    with FaultyServer() as server:
        pool = pool_of(server, timeout=0.2)
        late = threading.Event()
        server.next(Answer(wait_for=late))
        with pytest.raises(RemoteError, match=r"sent once and has no scores: .* had no answer within 0.2 s"):
            means(pool)
        late.set()
        assert server.scored == 1
        assert means(pool) == EXPECTED


def test_a_body_that_drips_forever_ends_at_its_time() -> None:
    # Every look at this clock is a second later than the one before.
    seconds = iter(range(10**6))
    transport = Transport(3.0, clock=lambda: float(next(seconds)), max_reply_bytes=10**9)
    with FaultyServer() as server:
        server.next(Answer(raw=b"HTTP/1.1 200 OK\r\n\r\n" + b" " * 10**6), path="/drip")
        with pytest.raises(RemoteError, match="had not all come within 3 s"):
            transport.exchange(addresses(server.url)[0], HttpRequest("GET", "/drip"))


def test_retry_after_is_honoured_up_to_a_bound() -> None:
    with FaultyServer() as server:
        pool = pool_of(server, time=(clock := FakeTime()))
        asked = [("7", 7.0), ("999999", 30.0), ("-1", None), ("soon", None), ("9" * 400, 30.0)]
        for header, seconds in asked:
            clock.slept.clear()
            server.next(error(429, headers=[("Retry-After", header)]))
            assert means(pool) == EXPECTED
            assert sum(clock.slept) == (seconds if seconds is not None else pytest.approx(0.5, abs=0.5))


def test_pauses_are_drawn_from_a_range_that_doubles_up_to_a_bound() -> None:
    longest = np.zeros(12)
    for seed in range(30):
        clock = FakeTime()
        servers = addresses("http://127.0.0.1:1")
        pool = Pool(servers, Transport(), NativeWire("mean"), clock=clock.clock, sleep=clock.sleep, seed=seed)
        [entry] = pool._servers
        pauses = []
        for _ in longest:
            pool._evict(entry, "down", 0.0)
            pauses.append(entry.out_until)
        longest = np.maximum(longest, pauses)
    bounds = np.minimum(15, 2.0 ** np.arange(12))
    assert (longest <= bounds).all()
    assert (longest > 0.8 * bounds).all()


def test_a_server_that_is_killed_and_restarted_goes_on() -> None:
    with FaultyServer() as server:
        clock = FakeTime()
        pool = pool_of(server, time=clock)
        assert means(pool) == EXPECTED
        server.kill()
        clock.on_sleep = lambda: server.start() if len(clock.slept) == 3 else None
        server.next(json_answer(Health(status="loading")), error(503), path="/health")
        assert means(pool) == EXPECTED
        # Three pauses while it was down, two while it loaded; scores were asked for once before and once after.
        assert len(clock.slept) == 5
        assert server.scored == 2


def test_a_server_that_stays_down_is_given_up_after_a_while() -> None:
    with FaultyServer() as server:
        clock = FakeTime()
        pool = pool_of(server, time=clock, patience=Patience(recovery=40.0))
        server.kill()
        with pytest.raises(
            RemoteError, match=r"No server .* came back within \d+ s. http.*Connection refused.*--ckpt_path"
        ):
            means(pool)
        assert 40 <= clock.now < 40.1


def test_batches_that_come_while_all_are_away_share_one_wait() -> None:
    with FaultyServer() as server:
        clock = FakeTime()
        pool = pool_of(server, time=clock, patience=Patience(recovery=40.0))
        server.kill()
        for _ in range(10):
            with pytest.raises(RemoteError, match="No server"):
                means(pool)
        assert clock.now < 40.1
        server.start()
        clock.now += 60
        assert means(pool) == EXPECTED, "a server that is back is found without a wait"
        server.kill()
        begun = clock.now
        with pytest.raises(RemoteError, match="No server"):
            means(pool)
        assert clock.now >= begun + 39, "another outage, another wait"


def test_a_server_that_comes_back_with_lower_limits_is_not_used() -> None:
    with FaultyServer() as server:
        clock = FakeTime()
        pool = pool_of(server, time=clock, patience=Patience(recovery=0.0))
        means(pool)
        server.kill()
        with pytest.raises(RemoteError, match="No server"):
            means(pool)
        clock.now += 60
        server.limits = server.limits.model_copy(update={"items": 1})
        server.start()
        with pytest.raises(UserError, match="takes less at once than the servers did when the run began"):
            means(pool)


def test_connections_are_kept_from_thread_to_thread() -> None:
    with FaultyServer() as server:
        pool = pool_of(server)
        before = server.connections
        for _ in range(5):
            thread = threading.Thread(target=means, args=(pool,))
            thread.start()
            thread.join()
        assert server.connections <= before + 1


def test_a_server_restarted_with_other_weights_ends_the_run() -> None:
    with FaultyServer() as server:
        pool = pool_of(server)
        server.info = server.info.model_copy(update={"revision": "2"})
        with pytest.raises(RemoteError, match="another model"):
            means(pool)
        with pytest.raises(UserError, match="cannot be used any more: .*revision '2' instead of '1'"):
            means(pool)


def test_secrets_stand_in_no_message(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with FaultyServer(token="s3cret") as server:
        wrong = pool_of(server, token="hunter2-token", started=False)
        with pytest.raises(UserError, match=r"answered with 401: wrong token: Bearer \*\*\*") as caught:
            wrong.start()
        pool = pool_of(server, token="s3cret")
        assert means(pool) == EXPECTED
        server.next(error(503, "what is s3cret?"), error(500, "s3cret again"))
        with pytest.raises(RemoteError) as failed:
            means(pool)
    told = (
        caplog.text
        + str(caught.value)
        + str(failed.value)
        + repr([vars(session) for session in pool._transport._idle.queue])
    )
    assert not [secret for secret in ("s3cret", "hunter2-token") if secret in told]
    assert sanitised("a" * 290 + "hunter2-token", ["hunter2-token"]).endswith("a***")


def test_proxies_and_passwords_of_the_environment_are_ignored(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password hidden")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with FaultyServer() as server:
        assert means(pool_of(server)) == EXPECTED
    assert not any("Authorization" in headers for headers in server.headers)


@pytest.mark.usefixtures("untouched_rng")
def test_one_connection_serves_many_requests_and_no_global_generator_is_drawn_from() -> None:
    with FaultyServer() as server:
        pool = pool_of(server)
        server.next(error(503))
        for _ in range(5):
            assert means(pool) == EXPECTED
        assert sum(server.asked.values()) == 2 + 6 + 2
        assert server.connections == 1


def test_every_kind_of_failure_has_a_policy_and_none_repeats_what_a_reward_raised() -> None:
    assert {kind for kind, policy in POLICIES.items() if policy.repeat == "anywhere"} == {
        "connection",
        "unavailable",
        "busy",
    }
    assert POLICIES["failed"].repeat == POLICIES["refused"].repeat == "never"


def test_cookies_are_not_kept() -> None:
    with FaultyServer() as server:
        pool = pool_of(server)
        right = server.right
        server.next(lambda s, body: Answer(**vars(right("/v1/score", body)) | {"headers": {"Set-Cookie": "a=b"}}))
        assert means(pool) == means(pool) == EXPECTED
    assert not any("Cookie" in headers for headers in server.headers)
