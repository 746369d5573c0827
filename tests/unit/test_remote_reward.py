"""A remote reward scores as the model would in process, and says at the start what is wrong with its options."""

from __future__ import annotations

import functools
import json
import logging
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faulty_server import INFO, LIMITS, Answer, FaultyServer, altered, error
from remote_tools import FakeTime

from calibri_lightning.errors import UserError
from calibri_lightning.prompts import Prompt
from calibri_lightning.remote.errors import RemoteError
from calibri_lightning.remote.pool import Pool
from calibri_lightning.remote.urls import addresses
from calibri_lightning.rewards import RewardConfig, RewardSet
from calibri_lightning.rewards.base import ModelInfo
from calibri_lightning.rewards.finding import check_reward, find_reward
from calibri_lightning.rewards.pixels import to_pixels
from calibri_lightning.rewards.remote import RemoteReward

IMAGES = torch.rand(5, 3, 8, 6, generator=torch.Generator().manual_seed(0))
PROMPTS = tuple(Prompt("x" * i, i) for i in range(5))
FLOAT = INFO.model_copy(update={"pixels": "float32"})


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeTime()
    made = functools.partial(Pool, clock=clock.clock, sleep=clock.sleep)
    monkeypatch.setattr("calibri_lightning.rewards.remote.Pool", made)


@pytest.fixture
def server() -> Iterator[FaultyServer]:
    with FaultyServer() as running:
        yield running


def expected(images: torch.Tensor = IMAGES) -> torch.Tensor:
    means = to_pixels(images).mean(axis=(1, 2, 3), dtype=np.float64) + np.arange(len(images))
    return torch.from_numpy(means).float()


def across_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("calibri_lightning.remote.urls.Address.on_this_machine", property(lambda _: False))


def test_scores_in_a_set_under_its_own_name(server: FaultyServer) -> None:
    options = {"urls": server.url, "reward": "mean", "extra_names": ["peak"]}
    rewards = RewardSet({"remote": RewardConfig(2.0, options)})
    rewards.check(PROMPTS)
    scores = rewards.score(IMAGES, PROMPTS)
    assert rewards.names == ("remote", "peak")
    assert torch.equal(scores.each["remote"], expected())
    assert torch.equal(scores.total, 2 * expected())
    assert scores.each["peak"].tolist() == to_pixels(IMAGES).max(axis=(1, 2, 3)).tolist()


def test_the_name_in_the_run_is_that_on_the_server_unless_told(server: FaultyServer) -> None:
    reward = find_reward("remote", {"urls": [server.url]})
    reward.name = "mean"
    assert torch.equal(reward(IMAGES, PROMPTS), expected())
    assert server.requests[-1].reward == "mean"
    other = RemoteReward(server.url)
    with pytest.raises(UserError, match="it offers 'mean' and no 'remote'"):
        other.check(PROMPTS)


def test_two_servers_score_as_one(server: FaultyServer) -> None:
    with FaultyServer() as second:
        both = RemoteReward([server.url, second.url], reward="mean", per_server=3)
        assert both.concurrency == 6
        first = both(IMAGES, PROMPTS)
        server.kill()
        assert torch.equal(both(IMAGES, PROMPTS), first)
        assert second.scored == 1
        assert torch.equal(first, RemoteReward(second.url, reward="mean")(IMAGES, PROMPTS))


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("codec", ["auto", "raw", "png", "webp-lossless"])
def test_pictures_arrive_as_they_are(
    server: FaultyServer, codec: str, far: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if far:
        across_hosts(monkeypatch)
    assert torch.equal(RemoteReward(server.url, reward="mean", codec=codec)(IMAGES, PROMPTS), expected())
    [sent] = {item.picture.codec for item in server.requests[-1].items}
    assert sent == ({False: "raw", True: "webp-lossless"}[far] if codec == "auto" else codec)
    assert server.requests[-1].exact


def test_floats_arrive_to_their_last_bit_and_so_do_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    across_hosts(monkeypatch)
    with FaultyServer(FLOAT) as server:
        reward = RemoteReward(server.url, reward="mean", exact=False)
        scores = reward(IMAGES, PROMPTS)
        exact = IMAGES.permute(0, 2, 3, 1).contiguous().numpy().astype(np.float64).mean(axis=(1, 2, 3))
        np.testing.assert_array_equal(scores.numpy(), (exact + np.arange(5)).astype(np.float32))
        assert reward.pixels == "float32"
        [picture, *_] = [item.picture for item in server.requests[-1].items]
        assert (picture.codec, picture.dtype, picture.shape) == ("raw", "float32", [8, 6, 3])
        assert not server.requests[-1].exact
        with pytest.raises(UserError, match="scores float32 pictures, which go as raw"):
            RemoteReward(server.url, reward="mean", codec="png").check(PROMPTS)


@pytest.mark.parametrize("kind", ["uint8", "float32"])
def test_videos_go_whole_to_who_scores_videos(kind: str) -> None:
    info = INFO.model_copy(update={"takes_frames": True, "pixels": kind})
    videos = IMAGES.reshape(1, 5, 3, 8, 6).expand(2, -1, -1, -1, -1)
    with FaultyServer(info) as server:
        reward = RemoteReward(server.url, reward="mean")
        reward.check(PROMPTS)
        assert reward.takes_frames
        scores = reward(videos, PROMPTS[:2])
    frames = to_pixels(IMAGES) if kind == "uint8" else IMAGES.permute(0, 2, 3, 1).contiguous().numpy()
    mean = frames.astype(np.float64).mean()
    torch.testing.assert_close(scores, torch.tensor([mean, mean + 1]).float())
    assert server.requests[-1].items[0].picture.shape == [5, 8, 6, 3]


def test_jpeg_is_sent_only_where_it_was_asked_for_and_is_taken() -> None:
    with FaultyServer() as server, pytest.raises(UserError, match="does not take the codec 'jpeg', but raw, png"):
        RemoteReward(server.url, reward="mean", codec="jpeg").check(PROMPTS)
    with FaultyServer(limits=LIMITS.model_copy(update={"codecs": ["raw", "jpeg"]})) as server:
        scores = RemoteReward(server.url, reward="mean", codec="jpeg")(IMAGES, PROMPTS)
    assert 0 < (scores - expected()).abs().max() < 5


def test_batches_are_cut_to_what_the_servers_take() -> None:
    with FaultyServer(limits=LIMITS.model_copy(update={"items": 2})) as server:
        assert torch.equal(RemoteReward(server.url, reward="mean")(IMAGES, PROMPTS), expected())
        assert [len(request.items) for request in server.requests] == [2, 2, 1]
    with FaultyServer(limits=LIMITS.model_copy(update={"body_bytes": 2500})) as server:
        # A picture of 144 bytes is 192 in base64; some 700 are counted for each.
        assert torch.equal(RemoteReward(server.url, reward="mean")(IMAGES, PROMPTS), expected())
        assert [len(request.items) for request in server.requests] == [3, 2]
    for limits in ({"pixels": 47}, {"body_bytes": 700}):
        with FaultyServer(limits=LIMITS.model_copy(update=limits)) as server:
            with pytest.raises(UserError, match=r"A picture \[8, 6, 3\] of 48 pixels .* Start it with higher limits"):
                RemoteReward(server.url, reward="mean")(IMAGES, PROMPTS)
            assert server.scored == 0


def test_no_pictures_no_request(server: FaultyServer) -> None:
    reward = RemoteReward(server.url, reward="mean", extra_names=["peak"])
    assert {name: list(values.shape) for name, values in reward.measure(IMAGES[:0], ()).items()} == {
        "remote": [0],
        "peak": [0],
    }
    assert server.scored == 0


def test_pictures_without_a_score_are_nan_told_once_and_counted(
    server: FaultyServer, caplog: pytest.LogCaptureFixture
) -> None:
    def no_face(places: list[int]) -> Callable[[dict[str, Any]], None]:
        def change(reply: dict[str, Any]) -> None:
            for i in places:
                reply["results"][i].update(scores={"mean": None, "peak": None}, error="no face")

        return change

    reward = RemoteReward(server.url, reward="mean")
    server.next(altered(no_face([0, 3])), altered(no_face([1])))
    with caplog.at_level(logging.WARNING):
        assert reward(IMAGES, PROMPTS).isnan().tolist() == [True, False, False, True, False]
        assert reward(IMAGES, PROMPTS).isnan().tolist() == [False, True, False, False, False]
    assert caplog.text.count("no face") == 1
    assert reward.failures == {"no face": 3}


def test_a_failed_call_is_no_mistake_of_the_user(server: FaultyServer) -> None:
    reward = RemoteReward(server.url, reward="mean")
    server.next(error(500))
    with pytest.raises(RemoteError) as caught:
        reward(IMAGES, PROMPTS)
    assert not isinstance(caught.value, UserError)
    server.next(error(500), path="/v1/check")
    with pytest.raises(UserError, match="could not be checked by the servers of 'remote': .*500"):
        reward.check(PROMPTS)


def test_all_prompts_are_checked_in_several_requests(server: FaultyServer) -> None:
    many = [Prompt(f"{i}", i) for i in range(450)]
    RemoteReward(server.url, reward="mean").check(many)
    assert server.asked["/v1/check"] == 3
    with pytest.raises(UserError, match="no score for 'forbidden'"):
        RemoteReward(server.url, reward="mean").check([*many, Prompt("forbidden", 450)])


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (Prompt("\ud800", 7), "row 7"),
        (Prompt("a", 1, {"when": object()}), "not JSON serializable"),
        (Prompt("a", 1, {"x": float("nan")}), "what JSON can hold"),
        (Prompt("a", 1, {"x": "\ud800"}), "what JSON can hold"),
    ],
)
def test_prompts_that_cannot_be_sent_are_told_at_the_start(server: FaultyServer, prompt: Prompt, message: str) -> None:
    with pytest.raises(UserError, match=message):
        RemoteReward(server.url, reward="mean").check([prompt])


def test_it_describes_what_the_servers_say(server: FaultyServer) -> None:
    assert RemoteReward(server.url, reward="mean").describe() == ModelInfo("tests:mean", "1", "none")


def test_nothing_is_contacted_before_the_start() -> None:
    reward = RemoteReward(["http://192.0.2.1:1", "https://nowhere.invalid/x/"], extra_names=["a"], token_env="UNSET")
    assert (reward.concurrency, reward.extra_names, reward.takes_frames) == (2, ("a",), False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"urls": []}, "it is one URL or a list"),
        ({"urls": [1]}, "it is one URL or a list"),
        ({"urls": "gpu7:8100"}, "the rule is http://host:port"),
        ({"urls": "ftp://gpu7"}, "the rule is"),
        ({"urls": "http://"}, "the rule is"),
        ({"urls": "http://a:99999"}, "cannot be read"),
        ({"urls": "http://a?token=x"}, "the rule is"),
        ({"urls": ["http://a:1", "http://a:1/"]}, "urls has http://a:1 twice.*per_server"),
        ({"urls": "http://a", "per_server": 0}, "per_server is 0"),
        ({"urls": "http://a", "per_server": True}, "per_server is True"),
        ({"urls": "http://a", "timeout": 0}, "timeout is 0; it is a number of seconds, more than 0"),
        ({"urls": "http://a", "timeout": "1"}, "timeout is '1'"),
        ({"urls": "http://a", "recovery_timeout": -1}, "recovery_timeout is -1; .* 0 or more"),
        ({"urls": "http://a", "extra_names": "peak"}, "extra_names is 'peak'; it is a list"),
        ({"urls": "http://a", "wire": "calibri-lightening"}, "Did you mean 'calibri-lightning'"),
        ({"urls": "http://a", "wire": "os:path"}, "class derived from Wire"),
        ({"urls": "http://a", "wire": "no.such:Wire"}, "cannot be imported"),
        ({"urls": "http://a", "codek": "raw"}, "has no option 'codek'; .* has codec, exact. Did you mean 'codec'"),
        ({"urls": "http://a", "codec": "gif"}, "codec is 'gif'; it is one of auto, raw, png"),
        ({"urls": "http://a", "exact": "yes"}, "exact is 'yes'"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_loaded(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        RemoteReward(**options)


def test_urls_are_needed() -> None:
    with pytest.raises(UserError, match="needs the option 'urls'"):
        check_reward("remote", {})


@pytest.mark.parametrize("url", ["http://me:pw@host:1", "http://pw@host", "http://me:pw@host:99999"])
def test_passwords_in_urls_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(UserError) as caught:
        RemoteReward(url)
    assert "pw" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_extra_names_must_be_the_servers(server: FaultyServer) -> None:
    reward = RemoteReward(server.url, reward="mean", extra_names=["peek"])
    with pytest.raises(UserError, match="extra_names of the reward 'remote' has 'peek'; its servers have peak"):
        reward.check(PROMPTS)


def test_tokens_come_from_the_environment_or_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "token"
    file.write_text("s3cret\n")
    monkeypatch.setenv("OUR_TOKEN", "s3cret")
    with FaultyServer(token="s3cret") as server:
        for given in ({"token_env": "OUR_TOKEN"}, {"token_file": str(file)}):
            assert torch.equal(RemoteReward(server.url, reward="mean", **given)(IMAGES, PROMPTS), expected())
        with pytest.raises(UserError, match="401"):
            RemoteReward(server.url, reward="mean").check(PROMPTS)
        assert not caplog.records
        across_hosts(monkeypatch)
        RemoteReward(server.url, reward="mean", token_env="OUR_TOKEN").check(PROMPTS)
    assert "goes over the network in the clear" in caplog.text
    assert "s3cret" not in caplog.text


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
def test_certificates_of_ones_own_are_trusted_when_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, certificate = str(tmp_path / "key.pem"), str(tmp_path / "certificate.pem")
    make = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    made = [*make.split(), "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate]
    subprocess.run(["openssl", *made], check=True, capture_output=True)
    # Only the option counts.
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", certificate)
    with FaultyServer(certificate=(certificate, key)) as server:
        reward = RemoteReward(server.url, reward="mean", ca_file=certificate)
        assert torch.equal(reward(IMAGES, PROMPTS), expected())
        with pytest.raises(UserError, match="certificate of https://.* is not trusted .* as ca_file"):
            RemoteReward(server.url, reward="mean").check(PROMPTS)


@pytest.mark.parametrize(
    ("options", "content", "message"),
    [
        ({"token_env": "UNSET"}, "", "'UNSET' of token_env is not set"),
        ({"token_env": "A", "token_file": "b"}, "", "both given"),
        ({"token_file": "nowhere"}, "", "cannot be read"),
        ({"token_file": "token"}, " \n", "holds no token"),
        ({"token_file": "token"}, "hidden word\r\nX: y", "holds no token"),
        ({"token_file": "token"}, "hiddén", "holds no token"),
        ({"ca_file": "nowhere.pem"}, "", "ca_file 'nowhere.pem' is no file"),
    ],
)
def test_tokens_that_are_none_are_refused_without_being_told(
    options: dict[str, str], content: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("token").write_text(content)
    os.environ.pop("UNSET", None)
    with pytest.raises(UserError, match=message) as caught:
        RemoteReward("http://127.0.0.1:1", **options).check(PROMPTS)
    assert "hidd" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "here"),
    [
        ("http://localhost:1", True),
        ("http://127.8.0.1", True),
        ("http://[::1]:5", True),
        ("https://gpu7", False),
        ("http://10.0.0.1:80", False),
        ("http://localhost.example.org", False),
    ],
)
def test_loopback_is_told_from_other_hosts(url: str, here: bool) -> None:
    assert addresses(url)[0].on_this_machine is here


def test_the_parts_of_a_batch_are_sent_together_and_put_back_in_order() -> None:
    meeting = threading.Barrier(5, timeout=30)

    def together(server: FaultyServer, body: bytes) -> Answer:
        meeting.wait()  # passes only if all five are under way at the same time
        return server.right("/v1/score", body)

    with FaultyServer(limits=LIMITS.model_copy(update={"items": 1})) as server:
        server.next(*[together] * 5)
        assert torch.equal(RemoteReward(server.url, reward="mean", per_server=5)(IMAGES, PROMPTS), expected())
        assert server.scored == 5


def test_a_part_that_fails_fails_the_batch() -> None:
    with FaultyServer(limits=LIMITS.model_copy(update={"items": 1})) as server:
        server.next(error(500, "a poisoned picture"))
        with pytest.raises(RemoteError, match="a poisoned picture"):
            RemoteReward(server.url, reward="mean", per_server=3)(IMAGES, PROMPTS)


def test_of_a_traceback_the_cause_is_told(server: FaultyServer) -> None:
    text = "Traceback (most recent call last):\n" + "  File x\n" * 200 + "ValueError: no such key"
    server.next(Answer(500, text.encode()))
    with pytest.raises(RemoteError, match="ValueError: no such key"):
        RemoteReward(server.url, reward="mean")(IMAGES, PROMPTS)


def test_a_fit_finds_an_absent_server_before_it_loads_anything(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from calibri_lightning.__main__ import main

    rewards = {"shapes": {"reward": "remote", "options": {"urls": "http://127.0.0.1:9"}}}
    flags = ["--model.backbone=SD3", "--model.backbone.pretrained=/nowhere", "--model.strategy=CMAES"]
    assert main(["fit", *flags, f"--model.rewards={json.dumps(rewards)}"]) == 2
    error = capsys.readouterr().err
    assert "No server of rewards can be reached at http://127.0.0.1:9" in error
    rewards["shapes"]["options"]["codex"] = "raw"
    assert main(["fit", *flags, f"--model.rewards={json.dumps(rewards)}"]) == 2
    assert "has no option 'codex'" in capsys.readouterr().err


def test_a_run_depends_on_what_scores_and_not_on_where(server: FaultyServer) -> None:
    def recipe(url: str, **options: Any) -> str:
        rewards = RewardSet({"mean": RewardConfig(1.0, {"urls": url, **options}, "remote")})
        rewards.check(PROMPTS)
        return rewards.recipe

    first = recipe(server.url, timeout=7)
    assert INFO.revision in first
    with FaultyServer() as elsewhere, FaultyServer(INFO.model_copy(update={"revision": "other"})) as other:
        assert recipe(elsewhere.url, per_server=2) == first
        assert recipe(other.url) != first
    assert recipe(server.url, codec="png") != first
