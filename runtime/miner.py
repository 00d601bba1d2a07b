"""Skills written by an endpoint (--miner), instead of the policy."""

import os

from huggingface_hub import InferenceClient
from tqdm import tqdm

from config import UserError
from runtime import parallel

PATIENCE = 3  # requests in a row without an answer, after which the rest of a round is not asked
TIMEOUT = 60.0  # seconds to wait for an answer


def ask_endpoint(prompts, config, seed) -> list[str]:
    """User messages -> texts, "" where no answer came in time; UserError when none did. The key is
    $OPENAI_API_KEY. Only one process asks, the others get its answers.
    """
    url, _, model = config.miner.partition("#")
    key = os.environ.get("OPENAI_API_KEY", "none")
    client = InferenceClient(base_url=url, api_key=key, timeout=TIMEOUT)
    settings = {"model": model or None, "max_tokens": config.max_response_tokens}
    answers = []  # (text, why there is none)
    asked = prompts if parallel.rank() == 0 else []
    for number, prompt in enumerate(tqdm(asked, desc="miner", unit="skill", leave=False)):
        if len(answers) >= PATIENCE and all(reason for _, reason in answers[-PATIENCE:]):
            answers.append(("", "not asked after the others had failed"))
            continue
        chat = [{"role": "user", "content": prompt}]
        try:
            own = {"temperature": 1.0, "seed": seed % 2**31 + number}
            answer = client.chat_completion(chat, **settings, **own)
            text = answer.choices[0].message.content
            if not isinstance(text, str):
                raise ValueError(f"the answer is {type(text).__name__}, not a text")
            answers.append((text, ""))
        except Exception as error:  # a server can fail, and lie, in any way
            answers.append(("", f"{type(error).__name__}: {error}".split("\n")[0][:200]))
    answers = parallel.all_gather(answers)
    reasons = [reason for _, reason in answers if reason]
    if len(reasons) == len(prompts) > 0:
        raise UserError(
            f"--miner {config.miner}: none of {len(prompts)} requests was answered ({reasons[0]}); "
            "start the endpoint, or look at the model after the #, then run this again"
        )
    if reasons:
        tqdm.write(f"miner: {len(reasons)} of {len(prompts)} requests unanswered ({reasons[0]})")
    return [text for text, _ in answers]
