"""Runs requests on an engine in a process of its own. Plain vLLM unless given a compression."""

from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt
from vllm.lora.request import LoRARequest
from vllm.sampling_params import StructuredOutputsParams

from tests.forks import in_forks
from vllm_qfilters import kv_compression


def run_engine(model, requests: list[dict], compression: dict | None, **llm) -> list[dict]:
    """Requests as :func:`generate_each` takes them. Returns token_ids, logprobs, prompt_logprobs of each."""
    (results,) = run_engines(model, requests, [compression], **llm)
    return results


def run_engines(model, requests: list[dict], compressions: list[dict | None], **llm) -> list[list[dict]]:
    """What :func:`run_engine` returns for each compression; the engines run side by side."""
    return in_forks(_run, *((str(model), requests, compression, llm) for compression in compressions))


def _run(model: str, requests: list[dict], compression: dict | None, llm: dict) -> list[dict]:
    options = kv_compression(**compression) if compression is not None else {}
    engine = LLM(model, **{"enforce_eager": True, **llm}, **options)
    results = []
    for output in generate_each(engine, requests):
        completion = output.outputs[0]
        results.append(
            {
                "token_ids": list(completion.token_ids),
                "logprobs": [step[token].logprob for token, step in zip(completion.token_ids, completion.logprobs)],
                "prompt_logprobs": [
                    None if step is None else {token: entry.logprob for token, entry in step.items()}
                    for step in output.prompt_logprobs or []
                ],
            }
        )
    return results


def generate_each(llm, requests: list[dict]) -> list:
    """The outputs of ``requests``, run together.

    Args:
        llm: the engine.
        requests: each has a prompt (token ids), perhaps the folder of a LoRA adapter, perhaps structured_outputs
            (keywords of vLLM's class), and SamplingParams as keywords. Another adapter takes the place of the one
            before.
    """
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
