"""Runs requests on an engine in a process of its own: JSON on stdin, JSON on stdout. Plain vLLM unless given a
compression.
"""

import json
import os
import subprocess
import sys

RESULTS = "results: "


def run_engine(model, requests: list[dict], compression: dict | None, **llm) -> list[dict]:
    """Requests as :func:`generate_each` takes them. Returns token_ids, logprobs, prompt_logprobs of each."""
    job = {"model": str(model), "requests": requests, "compression": compression, "llm": llm}
    done = subprocess.run(
        [sys.executable, "-m", "tests.run_engine"],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        env=os.environ,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    # vLLM logs to stdout as well, also when it is already shutting down.
    (results,) = [line for line in done.stdout.splitlines() if line.startswith(RESULTS)]
    return json.loads(results.removeprefix(RESULTS))


def generate_each(llm, requests: list[dict]) -> list:
    """The outputs of ``requests``, run together.

    Args:
        llm: the engine.
        requests: each has a prompt (token ids), perhaps the folder of a LoRA adapter, perhaps structured_outputs
            (keywords of vLLM's class), and SamplingParams as keywords. Another adapter takes the place of the one
            before.
    """
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import StructuredOutputsParams

    prompts, params, adapters = [], [], []
    for request in requests:
        request = dict(request)
        prompts.append(TokensPrompt(prompt_token_ids=request.pop("prompt")))
        adapter = request.pop("lora", None)
        adapters.append(None if adapter is None else LoRARequest("adapter", 1, str(adapter), load_inplace=True))
        if "structured_outputs" in request:
            request["structured_outputs"] = StructuredOutputsParams(**request["structured_outputs"])
        params.append(
            SamplingParams(**{"temperature": 0, "logprobs": 0, "ignore_eos": True, "detokenize": False, **request})
        )
    # Else a request joins the batch once its grammar is compiled, and batches, so last bits, differ from run to run.
    llm.llm_engine.engine_core.engine_core.structured_output_manager._use_async_grammar_compilation = False
    return llm.generate(prompts, params, use_tqdm=False, lora_request=adapters)


def main() -> None:
    from vllm import LLM

    from vllm_qfilters import kv_compression

    job = json.load(sys.stdin)
    compression = kv_compression(**job["compression"]) if job["compression"] is not None else {}
    llm = LLM(job["model"], **{"enforce_eager": True, **job["llm"]}, **compression)
    results = []
    for output in generate_each(llm, job["requests"]):
        completion = output.outputs[0]
        results.append(
            {
                "token_ids": list(completion.token_ids),
                "logprobs": [step[token].logprob for token, step in zip(completion.token_ids, completion.logprobs)],
                "prompt_logprobs": [
                    None if step is None else {str(token): entry.logprob for token, entry in step.items()}
                    for step in output.prompt_logprobs or []
                ],
            }
        )
    print(RESULTS + json.dumps(results))


if __name__ == "__main__":
    main()
