"""Short prompts written out as the long ones that models are trained on, by a language model.

Either an endpoint that speaks OpenAI's chat completions, or a transformers model in a local folder.
Nothing is sent anywhere unless asked for. A key is read from the environment, goes to the endpoint
that was named and nowhere else, and no message shows it.
"""

from __future__ import annotations

import http.client
import ipaddress
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from opensora.disk import replace_file
from opensora.errors import DataError, StorageError, UsageError, require

Refine = Callable[[str], str]

INSTRUCTION = (
    "You rewrite short requests as descriptions of a video for a text-to-video model. Keep every "
    "object, colour, number, motion and style that the request names, and add nothing that "
    "contradicts it. Say what is seen, how it moves, the surroundings, the light and the camera, "
    "in the present tense and in at most six sentences of plain English. Answer with the "
    "description alone."
)
KEY_VARIABLE = "OPENAI_API_KEY"
MAX_WORDS_BYTES = 1 << 20
_SECONDS = 60.0
_NEW_TOKENS = 300


def endpoint(url: str, model: str, *, key: str | None = None, seconds: float = _SECONDS) -> Refine:
    """A function that asks an OpenAI-compatible endpoint.

    It raises StorageError where there is no answer, or one of no use.

    Args:
        url: of the API, such as https://api.openai.com/v1; plain http only on this machine, because
            a key would be readable on the way.
        model: the endpoint's name of the model.
        key: by default the environment's OPENAI_API_KEY; endpoints on this machine often need none.
        seconds: that the endpoint may take to begin its answer, and again to end it.

    Raises:
        UsageError: the URL is none, or not safe, or the key cannot be one.
    """
    parts = urlsplit(url)
    is_url = url.isascii() and url.isprintable() and " " not in url
    if not is_url or parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"--refine {url}: give an http(s) URL of an API, or a model's folder")
    if parts.scheme == "http" and not _is_this_machine(parts.hostname):
        raise UsageError(f"--refine {url}: plain http leaves this machine unprotected; use https")
    if not model:
        raise UsageError("--refine with a URL needs --refine-model, the endpoint's name of it")
    secret = (os.environ.get(KEY_VARIABLE, "") if key is None else key).strip()
    if not (secret.isascii() and secret.isprintable()):  # http.client would quote it in its error
        raise UsageError(f"{KEY_VARIABLE} holds characters that no key has; set it anew")
    headers = {"Content-Type": "application/json"}
    if secret:
        headers["Authorization"] = f"Bearer {secret}"
    opener = urllib.request.build_opener(_NoRedirects)

    def ask(prompt: str) -> str:
        body = {"model": model, "messages": messages(prompt), "temperature": 0.0}
        request = urllib.request.Request(
            url.rstrip("/") + "/chat/completions", json.dumps(body).encode(), headers
        )
        try:
            with opener.open(request, timeout=seconds) as answer:
                content = json.loads(_read(answer, seconds))
            return _words(content["choices"][0]["message"]["content"])
        except urllib.error.HTTPError as error:
            reason = f"HTTP {error.code} {error.reason}"
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = str(getattr(error, "reason", error)).strip() or type(error).__name__
        except (KeyError, IndexError, TypeError):
            reason = "its answer has no choices[0].message.content"
        raise StorageError(f"{parts.hostname} did not refine the prompt: {reason}") from None

    return ask


def local(folder: str | Path) -> Refine:
    """A function that asks a causal language model of transformers, greedily.

    It raises StorageError where the model has nothing to say.

    Args:
        folder: with weights and a tokenizer that has a chat template.

    Raises:
        UsageError: the folder holds no such model.
    """
    transformers = require("transformers", extra="text", purpose="--refine with a folder")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UsageError(f"--refine {folder} holds no language model: {reason}") from None
    if not tokenizer.chat_template:
        raise UsageError(f"--refine {folder}: its tokenizer has no chat template; use a chat model")

    def ask(prompt: str) -> str:
        tokens = tokenizer.apply_chat_template(
            messages(prompt), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        made = model.eval().generate(**tokens, max_new_tokens=_NEW_TOKENS, do_sample=False)
        told = made[0, tokens["input_ids"].shape[1] :]
        try:
            return _words(tokenizer.decode(told, skip_special_tokens=True))
        except ValueError as error:
            raise StorageError(f"{folder} did not refine the prompt: {error}") from None

    return ask


def messages(prompt: str) -> list[dict[str, str]]:
    """What the language model is told."""
    return [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": prompt}]


def remembered(refine: Refine, path: Path, prompts: Iterable[str], *, by: str) -> dict[str, str]:
    """Prompt -> its long form, of which those in the file at `path` are not asked for again.

    Every answer is written down as it comes, so that a stopped call goes on, and the same call
    draws the same videos.

    Args:
        by: the name of the language model, which the file has to agree with.

    Raises:
        DataError: the file is damaged.
        UsageError: it has the answers of another model.
    """
    known: dict[str, str] = {}
    if path.exists():
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
            author, known = tree["by"], dict(tree["prompts"])
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path} cannot be read ({error}): remove it") from None
        if author != by:
            raise UsageError(f"{path} was written by '{author}', not '{by}': remove it")
    for prompt in prompts:
        if prompt not in known:
            known[prompt] = refine(prompt)
            tree = {"by": by, "prompts": known}
            text = json.dumps(tree, indent=1, ensure_ascii=False) + "\n"
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, text.encode())
    return known


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to a host that nobody named."""

    def redirect_request(self, *arguments: Any, **words: Any) -> None:
        return None


def _read(answer: http.client.HTTPResponse, seconds: float) -> bytes:
    """A whole answer; the socket's own timeout begins anew with every byte that drips in.

    Raises:
        ValueError: it is too large.
        TimeoutError: it takes too long.
    """
    content, deadline = b"", time.monotonic() + seconds
    while piece := answer.read1(1 << 16):
        content += piece
        if len(content) > MAX_WORDS_BYTES:
            raise ValueError(f"its answer is over {MAX_WORDS_BYTES} bytes")
        if time.monotonic() > deadline:
            raise TimeoutError(f"its answer had no end within {seconds:g} s")
    return content


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _words(text: Any) -> str:
    """An answer as one line.

    Raises:
        ValueError: it is empty, or no text.
    """
    if not isinstance(text, str) or not text.strip():
        raise ValueError("its answer is empty")
    return " ".join(text.split())
