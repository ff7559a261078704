"""A chat with the OpenAI client, under the server's budget and under budgets of its own.

    make serve
    python examples/openai_client.py [--url http://localhost:8000/v1]

What vLLM takes beside OpenAI's parameters travels in ``extra_body``. ``kv_budget`` lowers the budget of one request, in
tokens or as a fraction of its prompt; what the server does not allow is answered with status 400 and a reason.
"""

import argparse
from typing import Any

import openai


def ask(client: openai.OpenAI, question: str, **xargs: Any) -> str:
    """Sends one chat, with ``vllm_xargs`` where there are any, and returns what came back."""
    (model,) = client.models.list().data
    try:
        answer = client.chat.completions.create(
            model=model.id,
            messages=[{"role": "user", "content": question}],
            max_tokens=60,
            temperature=0,
            extra_body={"vllm_xargs": xargs} if xargs else None,
        )
    except openai.BadRequestError as error:
        return f"refused: {error.body['message']}"
    return answer.choices[0].message.content


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://localhost:8000/v1")
    client = openai.OpenAI(base_url=parser.parse_args().url, api_key="none")
    question = "What is a KV cache? " + "Answer in one sentence. " * 200
    print("the server's budget:", ask(client, question))
    print("half of the prompt:", ask(client, question, kv_budget=0.5))
    print("too small a budget:", ask(client, question, kv_budget=1))


if __name__ == "__main__":
    main()
