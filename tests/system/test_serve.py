"""What a user sees from `bulkhead serve`: pasted snippets work, both tenants stream, every record agrees."""

import base64
import json
import re
import shutil
import ssl
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from engine.journal import read_journals
from tests.fakes.tap import Tap, record_lengths
from tests.system.server import ROOT, Server, open_database, wait_until

pytestmark = pytest.mark.system
MEMORY_BYTES_MAX = 200 * 1024 * 1024
WORKER_BYTES_MAX = 700 * 1024 * 1024  # beside weights and KV cache


def test_the_printed_curl_answers(server: Server) -> None:
    command = next(line for line in server.output.splitlines() if line.startswith("curl "))
    done = subprocess.run(["sh", "-c", command + " --silent --show-error"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout


def test_the_printed_python_answers(server: Server, tmp_path: Path) -> None:
    lines = server.output.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("# pip install openai"))
    end = next(i for i, line in enumerate(lines) if line.startswith("print("))
    script = tmp_path / "snippet.py"
    script.write_text("\n".join(lines[start : end + 1]))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout


def test_a_call_is_made_and_its_result_goes_back(server: Server) -> None:
    """The demo model's template knows no tools: it is told in plain words, and a grammar holds it to the form."""
    client = server.openai("acme")
    model = client.models.list().data[0].id
    city = {"type": "string", "enum": ["Paris", "Rome", "Oslo"]}
    parameters = {"type": "object", "properties": {"city": city}, "required": ["city"], "additionalProperties": False}
    tool: Any = {"type": "function", "function": {"name": "get_weather", "parameters": parameters, "strict": True}}
    question: Any = {"role": "user", "content": "What is the weather in Paris now?"}
    asked: Any = {"model": model, "tools": [tool], "temperature": 0, "max_tokens": 100, "parallel_tool_calls": False}
    whole = client.chat.completions.create(**asked, messages=[question], tool_choice="required")
    message = whole.choices[0].message
    assert whole.choices[0].finish_reason == "tool_calls"
    assert message.tool_calls is not None
    [call] = message.tool_calls
    assert call.type == "function"
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Paris"})
    with client.chat.completions.stream(**asked, messages=[question], tool_choice="required") as stream:
        num_pieces = sum(event.type == "tool_calls.function.arguments.delta" for event in stream)
        streamed = stream.get_final_completion().choices[0]
    assert num_pieces > 1
    assert streamed.finish_reason == "tool_calls"
    assert [one.function.arguments for one in streamed.message.tool_calls or []] == [call.function.arguments]
    result: Any = {"role": "tool", "tool_call_id": call.id, "content": "It is 31 degrees and sunny in Paris."}
    history: Any = [question, message.model_dump(exclude_none=True), result]
    answer = client.chat.completions.create(**(asked | {"tools": openai.omit}), messages=history)
    assert "31" in (answer.choices[0].message.content or ""), answer.choices[0].message.content


def test_two_tenants_stream_at_once_and_all_records_agree(server: Server) -> None:
    model = server.openai("acme").models.list().data[0].id

    def stream(tenant: str, i: int) -> tuple[str, str, int, int, int]:
        chunks = server.openai(tenant).chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": f"Count to {i + 5} in words."}],
            max_tokens=24 + i,
            stream=True,
            stream_options={"include_usage": True},
        )
        text, usage, request_id = "", None, ""
        for chunk in chunks:
            request_id = chunk.id
            usage = chunk.usage or usage
            text += "".join(choice.delta.content or "" for choice in chunk.choices)
        assert text
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        cached = usage.prompt_tokens_details.cached_tokens or 0
        return tenant, request_id.replace("chatcmpl-", "req_"), usage.prompt_tokens, cached, usage.completion_tokens

    with ThreadPoolExecutor(8) as pool:
        told = list(pool.map(lambda i: stream(("acme", "globex")[i % 2], i), range(8)))

    wait_until(lambda: count_waiting(server) == 0, what="the outbox being sequenced")
    engine = read_journals(server.data_dir / "journal")
    with closing(open_database(server)) as db:
        for tenant, request_id, num_prompt_tokens, num_cached_tokens, num_completion_tokens in told:
            recorded = db.execute(
                "SELECT t.name, u.num_prompt_tokens, u.num_completion_tokens, u.amount_nano_usd, h.captured_nano_usd"
                " FROM usage_record u JOIN tenant t ON t.id = u.tenant_id JOIN hold h ON h.request_id = u.request_id"
                " WHERE u.request_id = ?",
                (request_id,),
            ).fetchone()
            counted = engine[request_id]  # by the worker itself, in its journal
            assert (counted.num_prompt_tokens, counted.num_completion_tokens) == (
                num_prompt_tokens,
                num_completion_tokens,
            )
            assert counted.num_cached_tokens == num_cached_tokens
            num_fresh_tokens = num_prompt_tokens - num_cached_tokens
            # nano-USD, at the demo prices
            amount = num_fresh_tokens * 150 + num_cached_tokens * 75 + num_completion_tokens * 600
            assert recorded == (tenant, num_prompt_tokens, num_completion_tokens, amount, amount)
            (in_ledger,) = db.execute(
                "SELECT sum(e.amount_nano_usd) FROM ledger_entry e JOIN ledger_transaction x ON x.id = e.transaction_id"
                " JOIN hold h ON h.id = x.hold_id JOIN account a ON a.id = e.account_id"
                " WHERE h.request_id = ? AND a.kind = 'revenue'",
                (request_id,),
            ).fetchone()
            assert in_ledger == amount
            leaves = db.execute(
                "SELECT l.kind FROM log_leaf l JOIN log_opening o ON o.leaf_index = l.leaf_index"
                " WHERE instr(o.body, CAST(? AS BLOB)) ORDER BY l.leaf_index",
                (request_id,),
            ).fetchall()
            assert [kind for (kind,) in leaves] == ["request.admitted", "request.settled"]
    assert "VERIFIED" in server.run("audit", "verify")


def test_answers_are_run_again_alone_beside_canaries_and_the_log_says_so(server: Server) -> None:
    client = server.openai("globex")
    model = client.models.list().data[0].id

    def ask(index: int) -> None:
        messages = [{"role": "user", "content": f"Name {index + 3} animals."}]
        client.chat.completions.create(model=model, messages=messages, max_tokens=40, logprobs=True)  # type: ignore[call-overload]

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, range(8)))

    def last_beat() -> dict[str, int]:
        with closing(open_database(server)) as db:
            row = db.execute(
                "SELECT o.body FROM log_leaf l JOIN log_opening o ON o.leaf_index = l.leaf_index"
                " WHERE l.kind = 'audit.heartbeat' ORDER BY l.leaf_index DESC LIMIT 1"
            ).fetchone()
        beat: dict[str, int] = json.loads(row[0]) if row is not None else {}
        return beat

    def compared() -> bool:
        beat = last_beat()
        return beat.get("num_replays", 0) >= 8 and beat["num_canaries"] > 0

    wait_until(compared, what="answers being run again", timeout_s=60)
    beat = last_beat()
    assert beat["num_sequences"] >= beat["num_replays"]
    assert beat["num_replays_differing"] == beat["num_violations"] == 0
    assert (beat["replay_percent"], beat["slots_per_step"]) == (100, 256)
    assert not any(name.startswith("audit") for name in read_journals(server.data_dir / "journal"))
    with closing(open_database(server)) as db:
        (strange,) = db.execute("SELECT count(*) FROM usage_record WHERE request_id NOT LIKE 'req_%'").fetchone()
        assert strange == 0


def test_a_covered_stream_shows_one_length_on_the_wire(server: Server) -> None:
    """The TLS records themselves, read between client and server: a token's length shows without cover only."""

    def lengths(covered: bool) -> set[int]:
        with Tap(server.port) as tap:
            answer = httpx.Client(
                base_url=f"https://127.0.0.1:{tap.port}", verify=ssl.create_default_context(cafile=str(server.ca))
            )
            with answer:
                whole = answer.post(
                    "/v1/chat/completions",
                    headers={"authorization": f"Bearer {server.keys['acme']}"},
                    json={
                        "model": server.openai("acme").models.list().data[0].id,
                        "messages": [{"role": "user", "content": "Count to ten in words."}],
                        "max_tokens": 24,
                        "stream": True,
                        "stream_options": {"include_obfuscation": covered},
                    },
                    timeout=60,
                )
            assert whole.status_code == 200
            assert whole.text.rstrip().endswith("data: [DONE]") or covered
            return set(record_lengths(tap.heard))

    shown, hidden = lengths(covered=False), lengths(covered=True)
    assert len({length for length in shown if length > 200}) >= 5
    # Head, pieces of one, two or three paddings; the last piece also ends the body.
    pieces = sorted(length for length in hidden if length > 1_000)
    assert pieces
    rests = {length % 1_024 for length in pieces}
    assert len(rests) <= 2, pieces
    assert len(pieces) <= 4, pieces


def count_waiting(server: Server) -> int:
    with closing(open_database(server)) as db:
        return int(db.execute("SELECT count(*) FROM outbox").fetchone()[0])


def test_the_http_process_is_small_and_has_no_torch(server: Server) -> None:
    assert server.process is not None
    maps = Path(f"/proc/{server.process.pid}/maps").read_text()
    assert not re.search(r"libtorch|numpy", maps)
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    peak_bytes = int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) * 1024  # type: ignore[union-attr]
    assert peak_bytes < MEMORY_BYTES_MAX


def test_the_worker_is_small_beside_its_weights(server: Server, model_dir: Path) -> None:
    """Weights once, not twice: a view into the file would keep all of it beside the packed matrices. What these tests
    have used of the KV cache counts here, too."""
    rss = server.children()["worker"].memory_info().rss
    weights = sum(file.stat().st_size for file in model_dir.glob("*.safetensors"))
    assert rss - weights < WORKER_BYTES_MAX


def test_readiness_tells_the_isolation_mode(server: Server) -> None:
    with server.http() as http:
        assert http.get("/healthz").status_code == 200
        ready = http.get("/readyz")
    assert ready.status_code == 200
    assert re.search(r"bitwise|relaxed", ready.text)


def test_an_answer_follows_its_schema(server: Server) -> None:
    schema = {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 20},
            "population": {"type": "integer", "minimum": 0, "maximum": 99_999_999},
            "capital": {"type": "boolean"},
        },
        "required": ["city", "population", "capital"],
        "additionalProperties": False,
    }
    client = server.openai("acme")
    answer = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": "Describe Paris."}],
        max_tokens=80,
        response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": schema, "strict": True}},
    )
    assert answer.choices[0].finish_reason == "stop"
    city = json.loads(answer.choices[0].message.content or "")
    assert list(city) == ["city", "population", "capital"]
    assert isinstance(city["city"], str)
    assert len(city["city"]) <= 20
    assert 0 <= city["population"] <= 99_999_999
    assert isinstance(city["capital"], bool)


def test_a_revoked_key_is_dead_at_once(server: Server) -> None:
    key = server.run("key", "create", "--tenant", "acme", "--name", "short-lived").splitlines()[0]
    headers = {"Authorization": f"Bearer {key}"}
    with server.http() as http:
        assert http.get("/v1/models", headers=headers).status_code == 200
        listed = server.run("key", "list", "--tenant", "acme")
        key_id = next(line.split()[0] for line in listed.splitlines() if "short-lived" in line)
        server.run("key", "revoke", key_id)
        assert http.get("/v1/models", headers=headers).status_code == 401
    assert key.split("-", 2)[2] not in listed


def test_nothing_of_a_deleted_tenant_is_left_but_its_books_and_a_receipt(server: Server) -> None:
    """Keys, holds, retained answers and cache blocks go; ledger, usage and the log stay, and the log says what went."""
    server.run("tenant", "create", "--name", "initech")
    assert "post-paid up to $1.00" in server.run("credit", "limit", "--tenant", "initech", "--usd", "1")
    key = server.run("key", "create", "--tenant", "initech", "--name", "k").splitlines()[0]
    headers = {"Authorization": f"Bearer {key}", "Idempotency-Key": "the-only-one"}
    long = "Count the sheep on the hill, one after the other, and tell me when you are tired of it. " * 5
    body: Any = {"messages": [{"role": "user", "content": long}], "max_tokens": 8}

    def rows(query: str) -> list[Any]:
        with closing(open_database(server)) as db:
            of = "(SELECT id FROM tenant WHERE name = 'initech')"
            return db.execute(query.replace("INITECH", of)).fetchall()

    def logged(kind: str) -> list[Any]:
        opened = "SELECT o.body FROM log_leaf l JOIN log_opening o ON o.leaf_index = l.leaf_index WHERE l.kind = ?"
        with closing(open_database(server)) as db:
            return [json.loads(one) for (one,) in db.execute(opened, (kind,))]

    with server.http() as http:
        model = http.get("/v1/models", headers=headers).json()["data"][0]["id"]
        answer = http.post("/v1/chat/completions", headers=headers, json={"model": model, **body})
        assert answer.status_code == 200, answer.text
        kept = "SELECT 1 FROM idempotency_key WHERE tenant_id = INITECH AND answer IS NOT NULL"
        wait_until(lambda: rows(kept), what="keeping the answer")
        with ThreadPoolExecutor(1) as pool:
            asked = {"model": model, **body, "max_tokens": 2_000, "stream": True, "ignore_eos": True}
            plain = {"Authorization": f"Bearer {key}"}
            running = pool.submit(http.post, "/v1/chat/completions", headers=plain, json=asked)
            wait_until(lambda: rows("SELECT 1 FROM hold WHERE tenant_id = INITECH AND state = 'pending'"))
            assert "suspend it" in server.run("tenant", "delete", "initech", expect=1)
            server.run("tenant", "suspend", "initech")
            assert "account_inactive" in running.result(60).text
        wait_until(lambda: not rows("SELECT 1 FROM hold WHERE tenant_id = INITECH AND state = 'pending'"))
        said = server.run("tenant", "delete", "initech", "--reason", "contract ended")
        assert "1 keys revoked, unspent credit $0.00" in said  # what is left of a line is nobody's
        assert http.get("/v1/models", headers=headers).status_code == 401

    assert rows(
        "SELECT count(*) FROM api_key k JOIN project p ON p.id = k.project_id WHERE p.tenant_id = INITECH "
        "AND k.revoked_ns IS NULL"
    ) == [(0,)]
    assert rows("SELECT count(*) FROM idempotency_key WHERE tenant_id = INITECH") == [(0,)]
    assert rows("SELECT balance_nano_usd FROM account WHERE tenant_id = INITECH AND kind = 'held'") == [(0,)]
    assert rows("SELECT count(*) FROM usage_record WHERE tenant_id = INITECH") == [(2,)]
    wait_until(lambda: logged("cache.erased"), what="erasing the cache")
    (receipt,) = [one for one in logged("tenant.deleted") if "contract ended" in str(one)]
    assert "num_keys_revoked" in str(receipt)
    assert any("num_blocks" in str(one) for one in logged("cache.erased"))


def test_budgets_on_the_command_line(server: Server) -> None:
    which = ("--scope", "tenant", "--of", "globex", "--period", "month", "--soft")
    server.run("budget", "set", *which, "--usd", "12.5")
    (row,) = [line for line in server.run("budget", "list", "--tenant", "globex").splitlines() if "month" in line]
    assert row.split()[-1].lstrip("$") == "12.50"
    assert "soft" in row
    server.run("budget", "remove", *which)
    assert "bulkhead budget list" in server.run("budget", "remove", *which, expect=1)
    assert "month" not in server.run("budget", "list")


def test_credit_is_corrected_on_the_command_line(server: Server) -> None:
    grant = ("credit", "grant", "--tenant", "globex", "--usd", "5", "--transfer-id", "trf_system")
    before = server.run(*grant)
    assert server.run(*grant) == before  # a repeat
    take = ("credit", "adjust", "--tenant", "globex", "--usd", "5", "--reason", "typo", "--take")
    after = server.run(*take, "--corrects", "trf_system", "--transfer-id", "trf_system_fix")
    assert after != before
    assert "cannot be taken" in server.run(*take[:5], "999999", *take[6:], expect=1)
    assert "nothing can be refunded" in server.run(
        "credit", "refund", "--request", "req_none", "--reason", "x", expect=1
    )


def test_commands_say_what_is_wrong_in_one_line(server: Server) -> None:
    said = server.run("key", "create", "--tenant", "nobody", expect=1)
    assert said.count("\n") == 1
    assert "bulkhead tenant list" in said


def test_the_server_stays_the_only_one_on_its_folder(server: Server) -> None:
    said = server.run("serve", expect=1)
    assert "another bulkhead" in said
    assert said.count("\n") == 1


def test_a_report_is_verified_where_there_is_nothing_but_cryptography(server: Server, tmp_path: Path) -> None:
    server.run("audit", "report", "--out", str(tmp_path))
    [statement] = tmp_path.glob("*.dsse.json")
    [pdf] = tmp_path.glob("*.pdf")
    assert pdf.read_bytes().startswith(b"%PDF")
    server.run("audit", "verify", "--report", str(statement))

    # What an outsider has: the report, a copy of the log, the keys, one file, and a Python with one package.
    outside = tmp_path / "outside"
    shutil.copytree(server.data_dir / "log", outside / "log")
    shutil.copy(ROOT / "audit" / "verify.py", outside)
    subprocess.run([sys.executable, "-m", "venv", outside / "venv"], check=True)
    python = outside / "venv" / "bin" / "python"
    pinned = ["-c", str(ROOT / "constraints.txt"), "cryptography"]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *pinned], check=True, cwd=outside)

    def verify(report: Path) -> int:
        command = [python, "verify.py", "report", report, "--log", "log", "--key", "log/keys.json"]
        return subprocess.run(command, cwd=outside, capture_output=True, timeout=60).returncode

    assert verify(statement) == 0
    damaged = tmp_path / "damaged.dsse.json"
    envelope = json.loads(statement.read_text())
    payload = bytearray(base64.b64decode(envelope["payload"]))
    payload[payload.index(b"num_settled") + 13] ^= 1
    damaged.write_text(json.dumps(envelope | {"payload": base64.b64encode(payload).decode()}))
    assert verify(damaged) == 1


def test_the_benchmark_measures_every_request(server: Server, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    options = ["--url", server.url, "--ca", str(server.ca), "--requests", "6", "--concurrency", "3"]
    server.run("bench", "gateway", "--key", server.keys["globex"], *options, "--max-tokens", "12", "--json", str(out))
    measured = json.loads(out.read_text())
    assert measured["summary"]["num_requests"] == len(measured["samples"]) == 6
    assert all(0 < sample["ttft_ms"] <= sample["total_ms"] for sample in measured["samples"])
    assert 6 <= measured["summary"]["num_completion_tokens"] <= 72
    said = server.run("bench", "gateway", "--key", "bk-wrong", *options, expect=1)
    assert "401" in said
