"""Skills by another writer than the policy: an endpoint, another model."""

import contextlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from config import UserError
from envs import build_mining_prompt
from mine import write_summaries
from runtime.policy import Policy, load_policy
from skills import parse_skill
from tiny import writer
from tiny.lessons_shop import lessons

SKILL_TEXT = '{"condition": "it is dark", "strategy": "use the lamp"}'


@pytest.fixture
def endpoint():
    """A small OpenAI-compatible server -> (its URL, requests it got, what it answers in turns)."""
    got = []
    answers = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            answer = answers[(len(got) - 1) % len(answers)]
            if answer == "late":
                time.sleep(3)
            status = 500 if answer == "broken" else 200
            body = answer if isinstance(answer, bytes) else json.dumps(reply(answer)).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", got, answers
    server.shutdown()
    server.server_close()


def reply(text) -> dict:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    return {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}


def test_an_endpoint_writes_the_skills_and_gets_the_prompt(endpoint, policy, config):
    url, got, answers = endpoint
    config.miner = f"{url}#big"
    answers.append(SKILL_TEXT)
    texts = write_summaries(["first", "second"], policy, config, seed=1)
    assert texts == [SKILL_TEXT] * 2
    assert [x["messages"][0]["content"] for x in got] == ["first", "second"]
    assert {x["model"] for x in got} == {"big"}
    assert got[0]["max_tokens"] == config.max_response_tokens
    assert {x["temperature"] for x in got} == {1.0}
    assert len({x["seed"] for x in got}) == 2  # or equal requests would give equal skills


@pytest.mark.parametrize("bad", ["late", "broken", b"no JSON", b"{}", b'{"choices": []}', None])
def test_an_endpoint_that_fails_or_lies_costs_one_summary_and_not_the_run(
    endpoint, policy, config, capsys, monkeypatch, bad
):
    config.miner, _, answers = endpoint
    monkeypatch.setattr("runtime.miner.TIMEOUT", 0.5)
    answers += [bad, SKILL_TEXT]
    assert write_summaries(["a", "b"], policy, config, seed=1) == ["", SKILL_TEXT]
    assert "1 of 2 requests unanswered" in capsys.readouterr().out


def test_an_endpoint_that_never_answers_ends_with_a_line_that_names_it(policy, config):
    config.miner = "http://127.0.0.1:9/v1"  # nobody listens there
    with pytest.raises(UserError, match="http://127.0.0.1:9/v1: none of 5 requests was answered"):
        write_summaries(["a"] * 5, policy, config, seed=1)


def test_another_model_writes_the_skills(policy, config, tmp_path):
    """Not the policy: here one that was made to end every answer at once."""
    with torch.no_grad():
        policy.model.model.norm.weight.zero_()  # all logits 0: any token is as likely
    policy.model.save_pretrained(tmp_path / "miner")
    policy.tokenizer.save_pretrained(tmp_path / "miner")
    fresh = Policy(*load_policy("tiny-household", config, "cpu"))
    prompts = ["You solved a task."]
    own = write_summaries(prompts, fresh, config, seed=1)
    config.miner = str(tmp_path / "miner")
    assert write_summaries(prompts, fresh, config, seed=1) != own
    assert write_summaries(prompts, policy, config, seed=1) != own


@pytest.fixture
def demonstrator():
    server = ThreadingHTTPServer(("127.0.0.1", 0), writer.Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def test_the_shops_demonstrator_writes_what_its_lessons_taught(demonstrator, policy, config):
    """The lessons' own summary of the same episode, by the endpoint and from the request alone."""
    config.miner = demonstrator
    asked = [(x, y) for x, y in lessons(300, seed=3) if y.startswith("{")]
    assert len(asked) > 10
    texts = write_summaries([x for x, _ in asked], policy, config, seed=1)
    for text, (_, taught) in zip(texts, asked, strict=True):
        found, wanted = parse_skill(text), parse_skill(taught)
        assert found[0] == wanted[0]
        assert sorted(re.findall(r"the (\w+)", found[1])) == sorted(
            re.findall(r"the (\w+)", wanted[1])
        )
    assert parse_skill(writer.write("hello")) is None
    seen = ("a page did: click[red]", "click[mint]"), ("a page", "click[buy now]")
    request = build_mining_prompt("a soap", "beauty", seen, (), 99, "webshop")
    assert "the scent of" in writer.write(request) and "color" not in writer.write(request)
