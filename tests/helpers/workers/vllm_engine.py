"""vLLM in a process, and an environment, of its own, with a request on standard input. JSON of a base's
directory, adapters' and prompts as tokens: log-probabilities of the next token come out. Or of adapters to
check: what vLLM's own loading code says comes out, and the updates in a file."""

import json
import os
import re
import sys

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


def answers(request):
    """By adapter, and None for the base: a list of log-probabilities for each prompt."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    size = request["vocabulary"]
    llm = LLM(
        request["base"],
        skip_tokenizer_init=True,
        enable_lora=True,
        max_lora_rank=request["max_lora_rank"],
        max_model_len=32,
        max_num_seqs=4,
        max_logprobs=size,
        enforce_eager=True,
        dtype="float32",
    )
    parameters = SamplingParams(max_tokens=1, temperature=0.0, logprobs=size, detokenize=False)
    prompts = [{"prompt_token_ids": prompt} for prompt in request["prompts"]]
    found = []
    for number, path in enumerate([None, *request["adapters"]]):
        lora = LoRARequest(str(number), number, path) if path else None
        outputs = llm.generate(prompts, parameters, lora_request=lora, use_tqdm=False)
        tables = [output.outputs[0].logprobs[0] for output in outputs]
        found.append([[table[token].logprob for token in range(size)] for table in tables])
    return found


def checks(request):
    """By adapter: None, or what it is refused with; updates in ``path/updates.safetensors``."""
    import torch
    from safetensors.torch import save_file
    from vllm.config.lora import LoRAConfig
    from vllm.lora import lora_model
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.lora_weights import PackedLoRALayerWeights
    from vllm.lora.peft_helper import PEFTHelper

    # Nothing goes to a GPU.
    lora_model.PIN_MEMORY = False

    def load(path, max_lora_rank, modules, vocabulary):
        helper = PEFTHelper.from_local_dir(path, None)
        helper.validate_legal(LoRAConfig(max_lora_rank=max_lora_rank))
        keys = re.findall(r"experts\.\d+\.[a-z_]+_proj", json.dumps(tensor_names(path)))
        expected = set(modules) | set(keys)
        model = LoRAModel.from_local_checkpoint(
            path, expected, helper, device="cpu", dtype=torch.float32, model_vocab_size=vocabulary
        )
        layers = sorted({name.rpartition(".experts.")[0] for name in model.loras if ".experts." in name})
        for layer in layers:
            count = 1 + max(
                int(n.split(".experts.")[1].split(".")[0]) for n in model.loras if ".experts." in n
            )
            names = [
                f"{layer}.experts.{expert}.{projection}"
                for expert in range(count)
                for projection in ("gate_proj", "down_proj", "up_proj")
            ]
            PackedLoRALayerWeights.pack_moe([model.loras.get(name) for name in names], layer)
        return {
            name: (lora.lora_b @ lora.lora_a * lora.scaling).contiguous()
            for name, lora in model.loras.items()
        }

    found = []
    for path, *arguments in request["checks"]:
        try:
            updates = load(path, *arguments)
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
        else:
            save_file(updates, os.path.join(path, "updates.safetensors"))
            found.append(None)
    return found


def tensor_names(path):
    from safetensors import safe_open

    with safe_open(os.path.join(path, "adapter_model.safetensors"), "pt") as file:
        return list(file.keys())


if __name__ == "__main__":
    given = json.load(sys.stdin)
    print("ANSWER" + json.dumps(checks(given) if "checks" in given else answers(given)), flush=True)
