"""What a person sees when the server is ready: where it is, keys that are shown once, and two snippets to paste."""

from rich.console import Console
from rich.rule import Rule

from gateway.host.first_run import FirstRun
from gateway.host.folders import Folders
from gateway.host.tls import TlsFiles
from gateway.settings import Settings

QUESTION = "What is the capital of France?"


def ready_banner(
    console: Console,
    settings: Settings,
    folders: Folders,
    tls: TlsFiles,
    model_id: str,
    port: int,
    fresh: FirstRun | None,
) -> None:
    """Print plain, unwrapped text: every line can be pasted."""
    url = f"https://{settings.host}:{port}"

    def line(text: str = "") -> None:
        console.print(text, soft_wrap=True, highlight=False, markup=False)

    console.print(Rule("Bulkhead is ready", style="green"))
    line(f"API    {url}/v1      model {model_id}")
    line(f"Admin  {url}/admin   (import {tls.ca} into your browser to trust it)")
    line(f"Data   {folders.data}")
    key = "$BULKHEAD_KEY"
    if fresh is None:
        line("Keys   were shown at the first start; a new one:  .venv/bin/bulkhead key create --tenant acme")
    else:
        line()
        line("Shown once, keep them:")
        for tenant, secret in fresh.tenant_keys.items():
            line(f"  {tenant:<8} {secret}")
        line(f"  admin    {fresh.operator_name} / {fresh.operator_password}")
        key = next(iter(fresh.tenant_keys.values()))
    line()
    line(curl_snippet(url, str(tls.ca), key, model_id))
    line()
    line(python_snippet(url, str(tls.ca), key, model_id))
    console.print(Rule(style="green"))


def curl_snippet(url: str, ca: str, key: str, model_id: str) -> str:
    body = f'{{"model": "{model_id}", "temperature": 0, "messages": [{{"role": "user", "content": "{QUESTION}"}}]}}'
    return (
        f'curl --cacert "{ca}" {url}/v1/chat/completions -H "Authorization: Bearer {key}" '
        f"-H 'Content-Type: application/json' -d '{body}'"
    )


def python_snippet(url: str, ca: str, key: str, model_id: str) -> str:
    secret = f'"{key}"' if not key.startswith("$") else f'os.environ["{key[1:]}"]'
    return "\n".join(
        (
            "# pip install openai",
            "import os, ssl, openai",
            f'trust = openai.DefaultHttpxClient(verify=ssl.create_default_context(cafile="{ca}"))',
            f'client = openai.OpenAI(base_url="{url}/v1", api_key={secret}, http_client=trust)',
            f'stream = client.chat.completions.create(model="{model_id}", temperature=0, stream=True,',
            f'    messages=[{{"role": "user", "content": "{QUESTION}"}}])',
            'print("".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices))',
        )
    )
