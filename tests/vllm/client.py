"""Runs in vLLM's interpreter: requests to a server with OpenAI's client. Prints the texts as one line of JSON.

python client.py URL MODEL REQUESTS.json      # [{"prompt": "w1 w2", "tokens": 8}, ...]
"""

import asyncio
import json
import sys
from typing import Any

import openai

Request = dict[str, Any]


def options(model: str, request: Request) -> dict[str, Any]:
    """Arguments of a greedy completion of an exact length."""
    its = {"prompt": request["prompt"], "max_tokens": request["tokens"]}
    return {"model": model, "temperature": 0, "extra_body": {"ignore_eos": True}} | its


async def complete(client: openai.AsyncOpenAI, model: str, request: Request, *, stream: bool) -> str:
    """The text of a completion, in one answer or joined from its stream."""
    if not stream:
        return (await client.completions.create(**options(model, request))).choices[0].text
    parts = await client.completions.create(**options(model, request), stream=True)
    return "".join([part.choices[0].text async for part in parts if part.choices])


async def cancel(client: openai.AsyncOpenAI, model: str, request: Request) -> None:
    """Read one token of a stream, then close the connection."""
    parts = await client.completions.create(**options(model, request | {"tokens": 100}), stream=True)
    async for _ in parts:
        break
    await parts.close()


async def main() -> None:
    """Alone, at once with some that are cancelled, beyond the context, and alone again."""
    url, model, path = sys.argv[1:]
    with open(path) as file:
        requests = json.load(file)
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300) as client:
        alone = [await complete(client, model, request, stream=False) for request in requests]
        together = [complete(client, model, request, stream=number % 2 == 0) for number, request in enumerate(requests)]
        cancelled = [cancel(client, model, request) for request in requests[::4]]
        texts = (await asyncio.gather(*together, *cancelled))[: len(requests)]
        try:
            await complete(client, model, {"prompt": "w1 " * 5000, "tokens": 8}, stream=False)
            refused = None
        except openai.BadRequestError as error:
            refused = str(error)
        again = [await complete(client, model, request, stream=True) for request in requests[:3]]
    print("RESULT", json.dumps({"alone": alone, "together": texts, "refused": refused, "again": again}))


if __name__ == "__main__":
    asyncio.run(main())
