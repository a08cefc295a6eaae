from __future__ import annotations

import email.utils
import json
import math
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace

import pytest

from qwen2audio_train.evaluation.judging.client import Client, CostCapError, Endpoint, JudgeError
from qwen2audio_train.evaluation.judging.judge import Judged, judge_answers, parse_scores, read_items
from tests.evaluation.judge_server import Judge, misbehaving_judge

MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture
def judge():
    with misbehaving_judge(Judge()) as found:
        yield found


@pytest.fixture
def pauses():
    return []


@pytest.fixture
def client(judge, tmp_path, pauses, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    endpoint = Endpoint(judge.url, "judge-1", tmp_path / "cache", api_key_variable="JUDGE_KEY", timeout_s=10.0)
    return Client(endpoint, sleep=pauses.append)


def items(count):
    return [Judged(f"q{i}", "a dog barks", "What is it?", f"a dog {i}", f"a cat {i}") for i in range(count)]


def test_asks_at_temperature_0_with_the_key_from_the_environment(judge, client):
    reply = client.complete(MESSAGES)
    assert (reply.text, reply.prompt_tokens, reply.from_cache) == ("8 6", 100, False)
    assert judge.requests[0]["temperature"] == 0
    assert judge.requests[0]["messages"] == MESSAGES
    assert judge.keys == ["Bearer secret"]


def test_nothing_is_asked_twice(judge, client):
    first = client.complete(MESSAGES)
    again = Client(client.endpoint).complete(MESSAGES)
    assert len(judge.requests) == 1
    assert again == replace(first, from_cache=True)
    Client(replace(client.endpoint, model="judge-2")).complete(MESSAGES)
    assert len(judge.requests) == 2
    assert "secret" not in "".join(p.read_text() for p in client.endpoint.cache_dir.rglob("*.json"))


def test_a_damaged_cache_file_is_asked_again(judge, client):
    client.complete(MESSAGES)
    (path,) = client.endpoint.cache_dir.rglob("*.json")
    path.write_text(path.read_text()[:20])
    assert client.complete(MESSAGES).text == "8 6"
    assert len(judge.requests) == 2
    assert not list(client.endpoint.cache_dir.rglob("*.part"))


@pytest.mark.parametrize("misdeed", [(500, {}), (429, {}), "drop", "truncated", "not json", "no choices"])
def test_passing_trouble_is_waited_out(judge, client, pauses, misdeed):
    judge.misdeeds += [misdeed, misdeed]
    assert client.complete(MESSAGES).text == "8 6"
    assert len(judge.requests) == 3
    assert 0.5 <= pauses[0] <= 1.0 <= pauses[1] <= 2.0, "exponential, with jitter"


def test_a_time_out_is_tried_again(judge, client):
    judge.misdeeds += ["slow"]
    assert Client(replace(client.endpoint, timeout_s=0.2), sleep=lambda _: None).complete(MESSAGES).text == "8 6"
    assert len(judge.requests) >= 2


def test_retry_after_is_honoured(judge, client, pauses):
    date = email.utils.formatdate(time.time() + 40, usegmt=True)
    judge.misdeeds += [(429, {"Retry-After": "17"}), (503, {"Retry-After": date})]
    client.complete(MESSAGES)
    assert pauses[0] == 17
    assert 30 < pauses[1] <= 40


def test_a_wrong_key_is_final(judge, client, pauses):
    judge.misdeeds.append((401, {}))
    with pytest.raises(JudgeError, match="HTTP 401"):
        client.complete(MESSAGES)
    assert (len(judge.requests), pauses) == (1, [])


def test_gives_up_in_the_end_and_says_why(judge, client):
    judge.misdeeds += [(500, {})] * 8
    with pytest.raises(JudgeError, match="no reply in 8 tries, the last: HTTP 500"):
        client.complete(MESSAGES)


def test_rate_limit_spaces_the_requests(judge, client, pauses):
    slow = Client(replace(client.endpoint, requests_per_minute=6), sleep=pauses.append)
    for i in range(3):
        slow.complete([{"role": "user", "content": str(i)}])
    assert len(pauses) == 2
    assert pauses == pytest.approx([10, 20], abs=1.0)


def test_cost_is_counted_and_capped_before_it_is_spent(judge, client):
    capped = Client(replace(client.endpoint, price_per_million=(10.0, 100.0), max_cost=0.004, max_tokens=16))
    capped.complete(MESSAGES)
    assert capped.spent == pytest.approx(100 * 10e-6 + 3 * 100e-6)
    capped.complete([{"role": "user", "content": "a second"}])
    with pytest.raises(CostCapError, match="max_cost"):
        capped.complete([{"role": "user", "content": "a third"}])
    assert len(judge.requests) == 2
    capped.complete(MESSAGES)
    assert capped.spent == pytest.approx(2 * 0.0013), "what is in the cache is free"
    with pytest.raises(CostCapError, match=r"0\.0026 spent"):
        Client(capped.endpoint).complete([{"role": "user", "content": "a third"}])


def test_a_reply_that_was_lost_on_its_way_counts_as_paid(judge, client):
    priced = Client(replace(client.endpoint, price_per_million=(0.0, 1e6), max_tokens=16), sleep=lambda _: None)
    judge.misdeeds += [(429, {}), "truncated"]
    priced.complete(MESSAGES)
    assert len(judge.requests) == 3
    assert priced.spent == 16 + 3, "the one in pieces at its most, the whole one by its tokens, the refused one nothing"


def test_killed_in_the_middle_nothing_is_paid_twice_and_the_bound_holds(judge, client):
    """Requests under way at the kill are lost, one per worker; they count as spent, so the bound still holds."""
    workers, cap = 2, 60.0
    judge.misdeeds += [None] * 9 + ["hang"] * workers  # None answers at once
    script = f"""
from qwen2audio_train.evaluation.judging.judge import Judged, judge_answers
from qwen2audio_train.evaluation.judging.client import Client, Endpoint
endpoint = Endpoint({judge.url!r}, "judge-1", {str(client.endpoint.cache_dir)!r}, price_per_million=(0.0, 1e6),
                    max_tokens=4, max_cost={cap})
items = [Judged(f"q{{i}}", "a dog barks", "What is it?", f"a dog {{i}}", f"a cat {{i}}") for i in range(6)]
judge_answers(Client(endpoint), items, workers={workers})
"""
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    while len(judge.requests) < 9 + workers and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    judge.released.set()
    endpoint = replace(client.endpoint, price_per_million=(0.0, 1e6), max_tokens=4, max_cost=cap)
    stored = len(list(client.endpoint.cache_dir.rglob("*.json")))
    again = Client(endpoint)
    assert stored == 9
    assert again.spent == 9 * 3 + workers * 4
    assert judge_answers(again, items(6), workers=1).outcomes == {"scored": 6}
    asked = Counter(request["messages"][0]["content"] for request in judge.requests)
    assert len(asked) == 12
    assert sum(asked.values()) == 12 + workers
    assert again.spent <= cap


@pytest.mark.parametrize(
    ("text", "scores"),
    [
        ("8 7", (8, 7)),
        (" 8, 7.5\n", (8, 7.5)),
        ("Scores:\n9 10", (9, 10)),
        ("10/1", (10, 1)),
        ("8", None),
        ("8 7 6", None),
        ("0 5", None),
        ("11 5", None),
        ("Assistant 1 gets 8 and assistant 2 gets 7.", None),
        ("8 7\n6 5", None),
        ("", None),
    ],
)
def test_parsing(text, scores):
    assert parse_scores(text) == scores


def test_the_swapped_scores_are_averaged(judge, client):
    # The judge gives the first answer one point more, whatever it is; the reference is worth 8 and the answer 5.
    judge.answer = lambda prompt: "9 5" if "[Answer 1]\na dog" in prompt else "6 8"
    judgement = judge_answers(client, items(4))
    assert judgement.answer.value == 5.5
    assert judgement.reference.value == 8.5
    assert judgement.lead == 1.0
    assert judgement.answer.n == 4
    assert judgement.outcomes == {"scored": 4}
    assert len(judge.requests) == 8


def test_what_is_not_scored_is_counted_by_reason(judge, client):
    def answer(prompt):
        if "dog 0" in prompt:
            return "I am sorry, but I cannot compare these."
        if "dog 1" in prompt:
            return {"message": {"content": None, "refusal": "no"}, "finish_reason": "stop"}
        if "dog 2" in prompt:
            return "both are fine"
        if "dog 3" in prompt:
            return {"message": {"content": ""}, "finish_reason": "content_filter"}
        return "4 4"

    judge.answer = answer
    judgement = judge_answers(client, items(6))
    assert judgement.outcomes == {"refused": 3, "unparsed": 1, "scored": 2}
    assert (judgement.answer.value, judgement.answer.n) == (4.0, 2)
    assert judgement.answer.extra == {"asked_for": 6.0, "left_out": 4.0}
    assert [v.outcome for v in judgement.verdicts][:3] == ["refused", "refused", "unparsed"]


def test_a_run_that_was_cut_off_by_its_budget_goes_on_where_it_stopped(judge, client):
    poor = Client(replace(client.endpoint, price_per_million=(10.0, 0.0), max_cost=0.008))
    first = judge_answers(poor, items(6), workers=1)
    assert 0 < first.outcomes["scored"] < 6
    assert first.outcomes["not_asked"] == 6 - first.outcomes["scored"]
    asked = len(judge.requests)
    second = judge_answers(Client(client.endpoint), items(6), workers=3)
    assert second.outcomes == {"scored": 6}
    assert len(judge.requests) == 12
    assert asked < 12


def test_items_of_an_evaluation(tmp_path):
    record = {"id": "a", "question": "What?", "reference": "a dog", "text": "a cat", "meta": {"description": "barking"}}
    silent = record | {"id": "b", "meta": {}}
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in (record, silent)))
    assert read_items(tmp_path) == [Judged("a", "barking", "What?", "a dog", "a cat")]
    path.write_text(json.dumps(silent) + "\n")
    with pytest.raises(ValueError, match="description"):
        read_items(tmp_path)


def test_failures_are_neither_scored_nor_hidden(judge, client):
    judge.misdeeds += [(500, {})] * 8
    judgement = judge_answers(client, items(1), workers=1)
    assert judgement.outcomes == {"failed": 1}
    assert math.isnan(judgement.answer.value)
    assert "HTTP 500" in judgement.verdicts[0].detail
