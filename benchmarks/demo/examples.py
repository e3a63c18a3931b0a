# SPDX-License-Identifier: Apache-2.0
"""How to talk to the running server, for the reader to copy."""

from benchmarks.demo.servers import MODEL_NAME

EXAMPLES = """
The server answers at {url}/v1. Two ways to talk to it; keep the session id for the next turn.

curl -s {url}/v1/chat/completions -H 'Content-Type: application/json' \\
  -H 'X-Session-ID: my-agent-1' -d '{{
  "model": "{model}", "temperature": 0, "max_tokens": 40,
  "messages": [{{"role": "user", "content": "Name three rivers in Europe."}}]}}'

from openai import OpenAI

client = OpenAI(base_url="{url}/v1", api_key="none")
tool = {{"type": "function", "function": {{
    "name": "get_weather", "strict": True,
    "parameters": {{
        "type": "object", "additionalProperties": False, "required": ["city"],
        "properties": {{"city": {{"type": "string", "enum": ["Oslo", "Lisbon"]}}}}}}}}}}
answer = client.chat.completions.create(
    model="{model}", temperature=0, max_tokens=40, tools=[tool], tool_choice="required",
    messages=[{{"role": "user", "content": "How is the weather in Oslo?"}}],
    extra_headers={{"X-Session-ID": "my-agent-2"}})
print(answer.choices[0].message.tool_calls, answer.usage.prompt_tokens_details)
"""


def usage_examples(url: str) -> str:
    """The examples for the server at this address."""
    return EXAMPLES.format(url=url, model=MODEL_NAME)
