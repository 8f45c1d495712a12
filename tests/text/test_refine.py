"""Prompts are written out by an endpoint or a local model, once, and no key is ever shown."""

import json
import socket
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from opensora.errors import DataError, StorageError, UsageError
from opensora.text.refine import INSTRUCTION, MAX_WORDS_BYTES, endpoint, local, remembered

SECRET = "sk-very-secret"


class Answers(BaseHTTPRequestHandler):
    """Answers as the test says, and remembers what it was asked."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, self.headers.get("Authorization"), body))
        status, content = self.server.answer(body)
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "http://127.0.0.1:9/elsewhere")
        self.end_headers()
        with suppress(BrokenPipeError, ConnectionResetError):
            for part in [content] if isinstance(content, bytes) else content:
                self.wfile.write(part)

    def log_message(self, *words):
        pass


def said(text) -> bytes:
    return json.dumps({"choices": [{"message": {"content": text}}]}).encode()


@pytest.fixture
def server():
    found = HTTPServer(("127.0.0.1", 0), Answers)
    found.asked = []
    found.answer = lambda body: (200, said("A long\n description."))
    thread = threading.Thread(target=found.serve_forever, daemon=True)
    thread.start()
    yield found
    found.shutdown()
    thread.join()
    found.server_close()


def url_of(server) -> str:
    return f"http://127.0.0.1:{server.server_port}/v1/"


def test_an_endpoint_is_asked_as_openai_is(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    assert endpoint(url_of(server), "small")("a dog") == "A long description."
    ((path, authorization, body),) = server.asked
    assert path == "/v1/chat/completions"
    assert authorization == f"Bearer {SECRET}"
    assert body["model"] == "small"
    assert body["messages"] == [
        {"role": "system", "content": INSTRUCTION},
        {"role": "user", "content": "a dog"},
    ]


@pytest.mark.parametrize(
    ("status", "content", "told"),
    [
        (401, b"", "HTTP 401"),
        (302, b"", "HTTP 302"),  # the key does not follow redirects
        (200, b"<html>", "did not refine the prompt"),
        (200, b"{}", r"no choices\[0\]"),
        (200, b'{"choices": []}', r"no choices\[0\]"),
        (200, said(""), "is empty"),
        (200, said(None), "is empty"),
    ],
)
def test_answers_of_no_use_are_told_without_the_key(server, status, content, told):
    server.answer = lambda body: (status, content)
    with pytest.raises(StorageError, match=told) as caught:
        endpoint(url_of(server), "small", key=SECRET)("a dog")
    assert SECRET not in str(caught.value)
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    "raw",
    [
        b"no HTTP at all\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"",
    ],
)
def test_what_does_not_speak_http_is_told_in_one_line(raw):
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer():
            connection, _ = listening.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(raw)

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        with pytest.raises(StorageError, match=r"did not refine the prompt: \S"):
            endpoint(url, "small", key=SECRET)("a dog")
        thread.join()


def test_an_answer_that_drips_or_never_ends_is_given_up(server):
    def drip(body):
        for _ in range(100):
            yield b" "
            time.sleep(0.05)

    server.answer = lambda body: (200, drip(body))
    with pytest.raises(StorageError, match=r"no end within 0\.3 s"):
        endpoint(url_of(server), "small", seconds=0.3)("a dog")
    server.answer = lambda body: (200, b" " * (MAX_WORDS_BYTES + 1))
    with pytest.raises(StorageError, match="is over 1048576 bytes"):
        endpoint(url_of(server), "small")("a dog")


def test_a_key_that_was_read_with_its_line_end_serves_and_one_that_is_none_is_not_shown(server):
    endpoint(url_of(server), "small", key=f"{SECRET}\n")("a dog")
    assert server.asked[0][1] == f"Bearer {SECRET}"
    for key in (f"{SECRET}\nX: y", f"{SECRET}\u2026"):
        with pytest.raises(UsageError, match="no key has") as caught:
            endpoint(url_of(server), "small", key=key)
        assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "model", "told"),
    [
        ("ftp://x/v1", "m", "http"),
        ("nowhere", "m", "http"),
        ("http://example.com/v1", "m", "use https"),
        ("https://example.com/v1", "", "--refine-model"),
        ("https://example.com/v 1", "m", "give an http"),
        ("https://example.com/v\u00e9", "m", "give an http"),
    ],
)
def test_endpoints_that_are_none_or_not_safe_are_refused(url, model, told):
    with pytest.raises(UsageError, match=told):
        endpoint(url, model)


def test_a_prompt_is_asked_for_once_and_what_is_known_survives(tmp_path):
    asked = []

    def ask(prompt: str) -> str:
        asked.append(prompt)
        if prompt == "c":
            raise StorageError("gone")
        return prompt.upper()

    path = tmp_path / "out/refined.json"
    with pytest.raises(StorageError):
        remembered(ask, path, ["a", "b", "a", "c"], by="small")
    assert asked == ["a", "b", "c"]
    assert remembered(ask, path, ["b", "a"], by="small") == {"a": "A", "b": "B"}
    assert asked == ["a", "b", "c"]
    with pytest.raises(UsageError, match="written by 'small', not 'large'"):
        remembered(ask, path, ["a"], by="large")


@pytest.mark.parametrize("content", ["{", "3", "{}", "\xff"])
def test_damaged_answers_are_told(content, tmp_path):
    path = tmp_path / "refined.json"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(DataError, match=r"refined\.json cannot be read"):
        remembered(str.upper, path, ["a"], by="small")


def test_a_local_language_model_answers(tmp_path):
    import tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    words = {"<end>": 0, "<unk>": 1, "a": 2, "dog": 3, "runs": 4}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>")
    config = GPT2Config(vocab_size=5, n_embd=8, n_layer=1, n_head=1, n_positions=512)
    model = GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="no chat template"):
        local(tmp_path)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    refine = local(tmp_path)
    try:
        told = refine("a dog")
    except StorageError as error:  # of random weights, which may have nothing to say
        assert "empty" in str(error)
    else:
        assert told == refine("a dog")
    with pytest.raises(UsageError, match="holds no language model"):
        local(tmp_path / "none")
