"""Skills written by another model than the policy (--miner): a model folder, or an endpoint."""

import os

from huggingface_hub import InferenceClient
from tqdm import tqdm

from config import UserError
from runtime import parallel
from runtime.policy import Policy, load_policy

PATIENCE = 3  # requests in a row without an answer, after which the rest of a round is not asked
TIMEOUT = 60.0  # seconds to wait for an answer


def is_endpoint(miner: str) -> bool:
    return miner.startswith(("http://", "https://"))


def load_miner(config, device) -> Policy:
    """The model of --miner, for one round; it is not trained."""
    return Policy(*load_policy(config.miner, config, device, trainable=False))


def ask_endpoint(prompts, config, seed) -> list:
    """User messages -> [text], "" where no answer came in time. The key is $OPENAI_API_KEY.

    UserError when none of them was answered. Only one process asks, the others get its answers.
    """
    answers = []
    if parallel.rank() == 0:
        answers = request_all(prompts, config, seed)
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


def request_all(prompts, config, seed) -> list:
    """[(text, why there is none)], one request after the other."""
    url, _, model = config.miner.partition("#")
    key = os.environ.get("OPENAI_API_KEY", "none")
    client = InferenceClient(base_url=url, api_key=key, timeout=TIMEOUT)
    answers = []
    silent = 0  # requests without an answer, in a row
    for number, prompt in enumerate(tqdm(prompts, desc="miner", unit="skill", leave=False)):
        if silent == PATIENCE:
            answers.append(("", "not asked after the others had failed"))
            continue
        try:
            completion = client.chat_completion(
                [{"role": "user", "content": prompt}],
                model=model or None,
                max_tokens=config.max_response_tokens,
                temperature=1.0,
                seed=seed % 2**31 + number,
            )
            text = completion.choices[0].message.content
            if not isinstance(text, str):
                raise ValueError(f"the answer is {type(text).__name__}, not a text")
            answers.append((text, ""))
            silent = 0
        except Exception as error:  # a server can fail, and lie, in any way
            reason = f"{type(error).__name__}: {error}".split("\n")[0][:200]
            answers.append(("", reason))
            silent += 1
    return answers
