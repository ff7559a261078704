"""The command ``python -m benchmarks`` runs the case that it is given, or lists the cases."""

import importlib
import sys

CASES = {
    "decode": "time per token, to the first token, and pages against context: plain vLLM, ours, StreamingLLM, limit",
    "throughput": "requests per second and concurrency with a cache of 1/8 of what the load would need",
    "elastic": "`evict: pressure` beside plain vLLM and `evict: always`, with room for the whole load and with less",
    "agents": "prompts that share long prefixes, turn after turn, with and without the prefix cache",
    "follow_up": "the next turn of a long conversation: seconds to its first token, tokens of the history read again",
    "conversations": "facts of its first messages, asked for at its end: plain vLLM, `prefix` exact and resume",
    "scheduler": "ms per step of the scheduler alone at 1,024 running requests: plain vLLM and ours",
    "start": "seconds from the command to the first answer, cold and warm: plain vLLM and ours",
    "readme": "what README's table and plots are made from: cases and tasks, of one clean commit",
    "kvpress": "Hugging Face transformers with kvpress at the same budget, beside vLLM and ours",
    "openvino": "OpenVINO GenAI, which evicts on CPUs too, beside vLLM and ours at the same budget",
    "llama_cpp": "llama.cpp, with its whole context and with context shift, beside vLLM and ours",
    "identity": "does a budget nobody reaches leave plain vLLM's output as it is, bit by bit?",
    "page_scores": "what page scores cost of a decode step",
    "operators": "the C++ kernels against the PyTorch ones, on the shapes of the demo model",
    "gpu_all": "all that only a GPU can show, in ten minutes, one file of results: scripts/gpu_all.sh",
    "gpu_kernels": "the Triton kernels on a GPU, on the shapes of Llama-3.1-8B",
}


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] not in CASES:
        print("usage: python -m benchmarks CASE [--help]\n")
        for name, summary in CASES.items():
            print(f"  {name:<15}{summary}")
        return 2
    name = sys.argv.pop(1)
    sys.argv[0] = f"python -m benchmarks {name}"
    return importlib.import_module(f"benchmarks.{name}").main() or 0


if __name__ == "__main__":
    sys.exit(main())
