"""vLLM in a process, and an environment, of its own, with a request on standard input. JSON of a base's
directory, adapters' and prompts as tokens: log-probabilities of the next token come out. Or of adapters to
check: what vLLM's own loading code says comes out, and the updates in a file. Or of a base with experts and
adapters on them: what the engine says comes out, and in a file the updates that it holds then."""

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
    llm = LLM(request["base"], max_logprobs=size, **options(request))
    parameters = SamplingParams(max_tokens=1, temperature=0.0, logprobs=size, detokenize=False)
    prompts = [{"prompt_token_ids": prompt} for prompt in request["prompts"]]
    found = []
    for number, path in enumerate([None, *request["adapters"]]):
        lora = LoRARequest(str(number), number, path) if path else None
        outputs = llm.generate(prompts, parameters, lora_request=lora, use_tqdm=False)
        tables = [output.outputs[0].logprobs[0] for output in outputs]
        found.append([[table[token].logprob for token in range(size)] for table in tables])
    return found


def options(request):
    return {
        "skip_tokenizer_init": True,
        "enable_lora": True,
        "max_lora_rank": request["max_lora_rank"],
        "max_model_len": 32,
        "max_num_seqs": 4,
        "enforce_eager": True,
        "dtype": "float32",
    }


def slots(request):
    """By adapter: None, or what it is refused with; updates in ``path/slots.safetensors``, of all experts of
    a layer w1, w3 and w2 as (experts, out, in)."""
    from safetensors.torch import save_file
    from vllm import LLM
    from vllm.lora.request import LoRARequest
    from vllm.model_executor.layers.fused_moe.experts import triton_moe

    # The kernel runs on GPUs only, and nothing is asked of the model but to load.
    triton_moe.TritonExperts.apply = lambda self, output, *args, **kwargs: output.zero_()
    llm = LLM(request["base"], max_cpu_loras=len(request["slots"]), **options(request))
    worker = llm.llm_engine.model_executor.driver_worker
    manager = getattr(worker, "worker", worker).model_runner.lora_manager._adapter_manager

    def held(module):
        every_a = [*module.w13_lora_a_stacked, *module.w2_lora_a_stacked]
        every_b = [*module.w13_lora_b_stacked, *module.w2_lora_b_stacked]
        return {name: b[0] @ a[0] for name, a, b in zip(("w1", "w3", "w2"), every_a, every_b, strict=True)}

    found = []
    for number, path in enumerate(request["slots"], 1):
        try:
            llm.llm_engine.add_lora(LoRARequest(str(number), number, path))
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
            continue
        updates = {}
        for name, module in manager.modules.items():
            if hasattr(module, "w13_lora_a_stacked"):
                updates |= {f"{name}.{part}": update for part, update in held(module).items()}
            elif name.endswith(".gate"):
                updates[name] = module.lora_b_stacked[0][0, 0] @ module.lora_a_stacked[0][0, 0]
        save_file({k: t.contiguous() for k, t in updates.items()}, os.path.join(path, "slots.safetensors"))
        found.append(None)
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
    run = next((run for name, run in (("checks", checks), ("slots", slots)) if name in given), answers)
    print("ANSWER" + json.dumps(run(given)), flush=True)
