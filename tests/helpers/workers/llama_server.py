"""llama.cpp's server in a process of its own, with a request on standard input: JSON of the base's file, the
adapters' files, prompts as tokens and the adapters' scales; log-probabilities of the next token come out."""

import json
import sys

import xllamacpp

request = json.load(sys.stdin)
params = xllamacpp.CommonParams()
params.model.path = request["base"]
params.n_ctx = 64
params.n_parallel = 1
params.warmup = False
params.n_gpu_layers = 0
params.verbosity = 0
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
# What float32 gives: by default keys and values are kept in float16.
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
adapters = []
for path in request["adapters"]:
    adapter = xllamacpp.CommonAdapterLoraInfo()
    adapter.path, adapter.scale = path, 1.0
    adapters.append(adapter)
params.lora_adapters = adapters
server = xllamacpp.Server(params)
answers = []
for prompt, scales in request["prompts"]:
    answer = server.handle_completions(
        {
            "prompt": prompt,
            "n_predict": 1,
            "temperature": 0,
            "logprobs": request["vocabulary"],
            "n_probs": request["vocabulary"],
            # Its cache would answer with what it kept of the same prompt under another scale.
            "cache_prompt": False,
            "lora": [{"id": i, "scale": scale} for i, scale in enumerate(scales)],
        }
    )
    if "choices" not in answer:
        raise SystemExit(f"llama.cpp: {answer}")
    content = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    answers.append([logprob for _, logprob in sorted((entry["id"], entry["logprob"]) for entry in content)])
print("ANSWER" + json.dumps(answers), flush=True)
