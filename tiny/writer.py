"""The shop's demonstrator as a writer of skills, behind an endpoint: it stands for a larger model.

    python -m tiny.writer                                  # in one terminal, until Ctrl-C
    python mine.py --miner http://127.0.0.1:8123/v1        # in another

Its summaries are those that the lessons taught (tiny/lessons_shop.py), without the policy's slips.
It reads no more than the request, as any endpoint does.
"""

import json
import re
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from config import check, flag
from runtime.flags import read_command_line
from runtime.run import run_script
from tiny.lessons_shop import summarize
from worlds.shop import OPTIONS


@dataclass
class Writer:
    port: int = flag(8123, "of this machine; 0: a free one", at_least=0, below=65536)


def write(request: str) -> str:
    """The user message of envs.build_mining_prompt -> the JSON of a skill, or why there is none."""
    kind = re.search(r"a task of the kind '(.*?)'", request)
    actions = re.findall(r"^\d+\. saw: .* did: (.*)$", request, re.M)
    if not (kind and actions):
        return "I summarize episodes of the shop only."
    return summarize(kind[1], OPTIONS, [("", action) for action in actions])


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        """OpenAI's chat completions, as far as runtime/miner.py asks for them."""
        length = int(self.headers.get("Content-Length", 0))
        asked = json.loads(self.rfile.read(length))
        message = {"role": "assistant", "content": write(asked["messages"][-1]["content"])}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        answer = {"id": "1", "object": "chat.completion", "created": 0, "model": "demonstrator"}
        body = json.dumps(answer | {"choices": [choice]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Nothing on the screen for each request."""


def main():
    writer = Writer(**read_command_line([Writer], __doc__))
    check(writer)
    with ThreadingHTTPServer(("127.0.0.1", writer.port), Handler) as server:
        print(f"--miner http://127.0.0.1:{server.server_port}/v1", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    run_script(main)
