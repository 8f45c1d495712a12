"""Hostile requests: all are refused with a 4xx in the documented form, and none leaves a file."""

from __future__ import annotations

import asyncio
import io
import json
import struct
import zipfile
import zlib
from pathlib import Path

import httpx
import pytest
from PIL import Image

from opensora.serve.api import build
from opensora.serve.refusals import CODES, Refusal
from tests.serve.conftest import TOKEN, Paced, client, serving

ID = "video_" + "0" * 32
JSON = {"content-type": "application/json"}


def png(width: int, height: int, *, honest: bool = True) -> bytes:
    """A PNG; one that is not honest claims a size and holds a few bytes."""
    if honest:
        file = io.BytesIO()
        Image.new("RGB", (width, height), "red").save(file, "PNG")
        return file.getvalue()

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(10_000_000), 9)
    start = b"\x89PNG\r\n\x1a\n"
    return start + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("../../evil.png", bytes(10_000_000))
    return file.getvalue()


def text_bomb() -> bytes:
    """A PNG whose compressed text is far larger than the file."""
    data = b"Comment\0\0" + zlib.compress(bytes(100_000_000), 9)
    chunk = struct.pack(">I", len(data)) + b"zTXt" + data
    chunk += struct.pack(">I", zlib.crc32(b"zTXt" + data))
    whole = png(8, 8)
    return whole[:33] + chunk + whole[33:]


def post(tree=None, **fields):
    """A JSON request; `fields` beside a good prompt."""
    body = json.dumps({"prompt": "a square", **fields} if tree is None else tree)
    return {"method": "POST", "url": "/v1/videos", "content": body, "headers": JSON}


def raw(body: bytes | str, kind: str = "application/json", **headers):
    return {"method": "POST", "url": "/v1/videos", "content": body,
            "headers": {"content-type": kind, **headers}}  # fmt: skip


def upload(content: bytes, *, name: str = "input_reference", file: str = "a.png",
           kind: str = "image/png", **fields):  # fmt: skip
    return {"method": "POST", "url": "/v1/videos", "data": {"prompt": "a square", **fields},
            "files": {name: (file, content, kind)}}  # fmt: skip


def call(method: str, url: str, **headers):
    return {"method": method, "url": url, "headers": headers}


FORM = "multipart/form-data; boundary=x"
HOSTILE = {
    # paths and URLs
    "output_path": (post(output_path="/etc/passwd"), "unknown_field"),
    "output": (post(output="../../x"), "unknown_field"),
    "file name": (post(filename="../../x.mp4"), "unknown_field"),
    "checkpoint": (post(checkpoint="/root"), "unknown_field"),
    "reference url": (post(reference_url="http://169.254.169.254/"), "unknown_field"),
    "reference metadata": (post(input_reference="http://169.254.169.254/latest"), "invalid_value"),
    "reference file url": (post(input_reference="file:///etc/passwd"), "invalid_value"),
    "reference path": (post(input_reference="/etc/passwd"), "invalid_value"),
    "reference object": (post(input_reference={"image_url": "http://127.0.0.1"}), "invalid_value"),
    "reference as text": (raw('--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na\r\n--x'
        '\r\nContent-Disposition: form-data; name="input_reference"\r\n\r\n/etc/passwd\r\n--x--',
        FORM), "invalid_value"),
    "model path": (post(model="../../other"), "model_not_found"),
    "get traversal": (call("GET", "/v1/videos/..%2f..%2fetc%2fpasswd"), "not_found"),
    "get dots": (call("GET", "/v1/videos/%2e%2e/%2e%2e/etc/passwd/content"), "not_found"),
    "get absolute": (call("GET", "/v1/videos//etc/passwd/content"), "not_found"),
    "get nul": (call("GET", f"/v1/videos/{ID}%00/content"), "not_found"),
    "get lock": (call("GET", "/v1/videos/.lock/content"), "not_found"),
    "delete traversal": (call("DELETE", "/v1/videos/..%2f.."), "not_found"),
    "delete all": (call("DELETE", "/v1/videos/*"), "not_found"),
    "package file": (call("GET", "/config.py"), "not_found"),
    "page traversal": (call("GET", "/..%2fapi.py"), "not_found"),
    # numbers
    "steps huge": (post(steps=10**9), "out_of_bounds"),
    "steps zero": (post(steps=0), "invalid_value"),
    "steps negative": (post(steps=-1), "invalid_value"),
    "steps fraction": (post(steps=1.5), "invalid_value"),
    "steps 10^400": (raw(b'{"prompt": "a", "steps": 1' + b"0" * 400 + b"}"), "out_of_bounds"),
    "steps 10^5000": (raw(b'{"prompt": "a", "steps": 1' + b"0" * 5000 + b"}"), "invalid_json"),
    "frames huge": (post(num_frames=10**9), "out_of_bounds"),
    "frames that do not fit": (post(num_frames=6), "invalid_value"),
    "seconds huge": (post(seconds=1e9), "out_of_bounds"),
    "seconds 1e999": (raw('{"prompt": "a", "seconds": 1e999}'), "invalid_value"),
    "seconds and frames": (post(seconds=1, num_frames=5), "invalid_value"),
    "size huge": (post(size="1000000x1000000"), "out_of_bounds"),
    "size thin": (post(size="8x1000000"), "out_of_bounds"),
    "size zero": (post(size="0x0"), "invalid_value"),
    "size negative": (post(size="-8x-8"), "invalid_value"),
    "size that does not fit": (post(size="15x17"), "invalid_value"),
    "size long": (post(size="1" * 10_000 + "x1"), "invalid_value"),
    "size shell": (post(size="8x8; reboot"), "invalid_value"),
    "size digits of another script": (post(size="١٦x١٦"), "invalid_value"),
    "work": (post(size="16x24", num_frames=9, steps=90), "out_of_bounds"),
    "fps huge": (post(fps=1e9), "out_of_bounds"),
    "fps zero": (post(fps=0), "invalid_value"),
    "guidance huge": (post(guidance_scale=1e30), "out_of_bounds"),
    "guidance NaN": (raw('{"prompt": "a", "guidance_scale": NaN}'), "invalid_json"),
    "guidance Infinity": (raw('{"prompt": "a", "guidance_scale": Infinity}'), "invalid_json"),
    "guidance NaN as text": (post(guidance_scale="nan"), "invalid_value"),
    "seed negative": (post(seed=-1), "invalid_value"),
    "seed beyond exact": (post(seed=2**53), "invalid_value"),
    "n many": (post(n=10**6), "invalid_value"),
    # types and bodies
    "prompt missing": (post({}), "invalid_prompt"),
    "prompt null": (post({"prompt": None}), "invalid_value"),
    "prompt number": (post({"prompt": 5}), "invalid_value"),
    "prompt list": (post({"prompt": ["a"]}), "invalid_value"),
    "prompt object": (post({"prompt": {"$ne": 1}}), "invalid_value"),
    "steps text": (post(steps="many"), "invalid_value"),
    "steps true": (post(steps=True), "invalid_value"),
    "prototype": (post(__proto__={"a": 1}), "unknown_field"),
    "a typing error": (post(sedd=1), "unknown_field"),
    "list": (post([1]), "invalid_json"),
    "text": (post("a"), "invalid_json"),
    "null": (raw("null"), "invalid_json"),
    "nothing": (raw(b""), "invalid_json"),
    "half": (raw('{"prompt": "a'), "invalid_json"),
    "key twice": (raw('{"prompt": "a", "prompt": "b"}'), "invalid_json"),
    "deep": (raw("[" * 100_000), "invalid_json"),
    "no utf-8": (raw(b'{"prompt": "\xff\xfe"}'), "invalid_json"),
    "utf-16": (raw('{"prompt": "a"}'.encode("utf-16")), "invalid_json"),
    "yaml": (raw("prompt: !!python/object/apply:os.system [id]", "application/yaml"),
             "unsupported_media_type"),
    "pickle": (raw(b"\x80\x04.", "application/octet-stream"), "unsupported_media_type"),
    "urlencoded": (raw("prompt=a", "application/x-www-form-urlencoded"), "unsupported_media_type"),
    "plain, as other sites can send": (raw('{"prompt": "a"}', "text/plain"),
                                       "unsupported_media_type"),
    "gzip": (raw(zlib.compress(bytes(10**6)), **{"content-encoding": "gzip"}),
             "unsupported_media_type"),
    "giant": (raw(b'{"prompt": "' + b"a" * 3_000_000 + b'"}'), "body_too_large"),
    "giant, as it says": (raw(b"{}", **{"content-length": "9" * 30}), "body_too_large"),
    "giant on a get": ({**raw(bytes(3_000_000)), "method": "GET"}, "body_too_large"),
    # prompts
    "prompt empty": (post(prompt=""), "invalid_prompt"),
    "prompt blank": (post(prompt=" \n\t "), "invalid_prompt"),
    "prompt long": (post(prompt="a" * 2001), "out_of_bounds"),
    "negative prompt long": (post(negative_prompt="a" * 2001), "out_of_bounds"),
    "prompt nul": (post(prompt="a\0b"), "invalid_prompt"),
    "prompt ansi": (post(prompt="\x1b[2J\x1b]0;owned\x07"), "invalid_prompt"),
    "prompt c1": (post(prompt="\x9b31m"), "invalid_prompt"),
    "prompt surrogate": (raw('{"prompt": "\\ud800"}'), "invalid_prompt"),
    "prompt right to left": (post(prompt="a\u202egpj.exe"), "invalid_prompt"),
    "negative prompt nul": (post(negative_prompt="\0"), "invalid_prompt"),
    # forms and uploads
    "form without boundary": (raw("x", "multipart/form-data"), "invalid_multipart"),
    "form of rubbish": (raw("x" * 1000, FORM), "invalid_multipart"),
    "form of another charset": (raw('--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na'
        "\r\n--x--", FORM + "; charset=evil"), "unsupported_media_type"),
    "form of many fields": (raw("".join(f'--x\r\nContent-Disposition: form-data; name="f{i}"\r\n'
        "\r\na\r\n" for i in range(50)) + "--x--", FORM), "invalid_multipart"),
    "form of a large field": (raw('--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n'
        + "a" * 100_000 + "\r\n--x--", FORM), "invalid_multipart"),
    "form with a field twice": (raw('--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na'
        '\r\n--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nb\r\n--x--', FORM),
        "invalid_multipart"),
    "file under another name": (upload(png(8, 8), name="mask"), "unknown_field"),
    "file traversal and rubbish": (upload(b"x", file="../../../evil.png"), "invalid_picture"),
    "file empty": (upload(b""), "invalid_picture"),
    "zip bomb": (upload(zipped()), "invalid_picture"),
    "gif": (upload(b"GIF89a" + b"\xff" * 100, kind="image/gif"), "invalid_picture"),
    "svg": (upload(b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/>'
                   b"</svg>", kind="image/svg+xml"), "invalid_picture"),
    "html": (upload(b"<script>alert(1)</script>", kind="text/html"), "invalid_picture"),
    "mp4": (upload(b"\0\0\0\x18ftypisom" + bytes(100), kind="video/mp4"), "invalid_picture"),
    "png header alone": (upload(b"\x89PNG\r\n\x1a\n"), "invalid_picture"),
    "png of 50000x50000": (upload(png(50_000, 50_000, honest=False)), "invalid_picture"),
    "png larger than the bound": (upload(png(1100, 1000)), "invalid_picture"),
    "png whose text expands": (upload(text_bomb()), "invalid_picture"),
    "webp of rubbish": (upload(b"RIFF\xff\xff\xff\xffWEBPVP8X" + b"\xff" * 64), "invalid_picture"),
    "bmp of 2^31 pixels": (upload(b"BM" + bytes(12) + struct.pack("<IiiHHIIiiII", 40, 65535, 32767,
        1, 24, 0, 0, 0, 0, 0, 0)), "invalid_picture"),
    "picture for a video of one frame": (upload(png(8, 8), num_frames="1"), "invalid_value"),
    # methods, queries and headers
    "put": (call("PUT", "/v1/videos"), "method_not_allowed"),
    "patch": (call("PATCH", f"/v1/videos/{ID}"), "method_not_allowed"),
    "trace": (call("TRACE", "/v1/videos"), "method_not_allowed"),
    "connect": (call("CONNECT", "/v1/videos"), "method_not_allowed"),
    "preflight": (call("OPTIONS", "/v1/videos"), "method_not_allowed"),
    "delete the list": (call("DELETE", "/v1/videos"), "method_not_allowed"),
    "post to a video": (call("POST", f"/v1/videos/{ID}"), "method_not_allowed"),
    "method with escapes": (call("EV\x1bIL", "/v1/videos"), "method_not_allowed"),
    "list of all": (call("GET", "/v1/videos?limit=100000"), "invalid_value"),
    "list of none": (call("GET", "/v1/videos?limit=0"), "invalid_value"),
    "list after nothing": (call("GET", "/v1/videos?after=../x"), "not_found"),
    "list in an order": (call("GET", "/v1/videos?order=desc;drop"), "invalid_value"),
    "list by another query": (call("GET", "/v1/videos?path=/etc"), "unknown_field"),
    "list by a query twice": (call("GET", "/v1/videos?limit=1&limit=2"), "unknown_field"),
    "unknown video": (call("GET", f"/v1/videos/{ID}"), "not_found"),
    "unknown content": (call("GET", f"/v1/videos/{ID}/content"), "not_found"),
    "unknown model": (call("GET", "/v1/models/other"), "not_found"),
    "unknown page": (call("GET", "/admin"), "not_found"),
    "another host": (call("GET", "/v1/videos", host="evil.example"), "foreign_host"),
    "a host that begins alike": (call("GET", "/v1/videos", host="127.0.0.1.evil.example"),
                                 "foreign_host"),
    "no host": (call("GET", "/v1/videos", host=""), "foreign_host"),
    "another origin": ({**post(), "headers": {**JSON, "origin": "https://evil.example"}},
                       "foreign_origin"),
    "origin null": ({**upload(b"x"), "headers": {"origin": "null"}}, "foreign_origin"),
    "another site": ({**post(), "headers": {**JSON, "sec-fetch-site": "cross-site"}},
                     "foreign_origin"),
}  # fmt: skip


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.fixture
def service(tmp_path):
    """A service that would take them all, and never draws."""
    folder = tmp_path / "out"
    settings = {"max_body": 2**21, "max_reference_pixels": 10**6}
    with serving(folder, Paced(), started=False, queue=1000, **settings) as service:
        yield service


@pytest.mark.parametrize(
    ("request_", "param", "told"),
    [
        (post(num_frames=6), "num_frames", "draws 1 + 4 k: give `num_frames` as 5 or 9"),
        (post(size="15x23"), "size", "multiples of 8 and 8: give `size` as 16x24"),
        (post({"promt": "a"}), "promt", "there is no field `promt`. Did you mean 'prompt'?"),
    ],
)
def test_a_refusal_says_the_nearest_that_is_taken(request_, param, told, service):
    async def ask():
        async with client(service) as http:
            return await http.request(**request_)

    error = asyncio.run(ask()).json()["error"]
    assert error["param"] == param
    assert told in error["message"]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_request_is_refused_and_leaves_nothing(name, service, monkeypatch):
    request, code = HOSTILE[name]
    folder = service.store.folder.parent
    monkeypatch.chdir(folder)
    before = everything(folder)

    async def ask():
        async with client(service) as http:
            return await http.request(**request)

    answer = asyncio.run(ask())
    assert answer.json()["error"]["code"] == code, answer.text
    assert answer.status_code == CODES[code]
    assert 400 <= answer.status_code < 500
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert len(answer.content) < 1000
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "access-control-allow-origin" not in answer.headers
    assert everything(folder) == before
    assert service.store.jobs() == []


def test_the_hostile_requests_are_many():
    assert len(HOSTILE) >= 60


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer ", "Bearer wrong", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}",
     f"Basic {TOKEN}", TOKEN, f"Bearer {TOKEN.upper()}", f"Bearer {TOKEN}, Bearer x",
     "Bearer \u00fc".encode("latin-1")],
)  # fmt: skip
@pytest.mark.parametrize("url", ["/v1/videos", "/v1/models", "/metrics", "/openapi.json", "/none"])
def test_without_the_token_nothing_is_told(header, url, tmp_path):
    async def ask():
        with serving(tmp_path / "out", Paced(), token=TOKEN, started=False) as service:
            async with client(service) as http:
                headers = {} if header is None else {"authorization": header}
                return await http.get(url, headers=headers)

    answer = asyncio.run(ask())
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_token"
    assert answer.headers["www-authenticate"].startswith("Bearer")
    assert TOKEN not in answer.text


def test_with_the_token_any_host_is_answered(tmp_path):
    async def ask():
        with serving(tmp_path / "out", Paced(), token=TOKEN, started=False) as service:
            async with client(service, token=TOKEN) as http:
                return [
                    (await http.get(url, headers={"host": "gpu.example:8000"})).status_code
                    for url in ("/v1/videos", "/metrics", "/", "/page.js")
                ]

    assert asyncio.run(ask()) == [200, 200, 200, 200]


def test_a_header_that_decides_may_not_come_twice(tmp_path):
    async def ask():
        with serving(tmp_path / "out", Paced(), token=TOKEN, started=False) as service:
            async with client(service) as http:
                pairs = [("authorization", f"Bearer {TOKEN}"), ("authorization", "Bearer x")]
                return await http.get("/v1/videos", headers=httpx.Headers(pairs))

    assert asyncio.run(ask()).status_code == 403


def test_a_body_that_does_not_come_is_not_waited_for(tmp_path):
    sent = []

    async def never():
        await asyncio.Event().wait()

    async def send(message):
        sent.append(message)

    async def ask():
        with serving(tmp_path / "out", Paced(), started=False, body_seconds=0.01) as service:
            scope = {"type": "http", "method": "POST", "path": "/v1/videos", "query_string": b"",
                     "headers": [(b"host", b"localhost")]}  # fmt: skip
            await build(service)(scope, never, send)

    asyncio.run(ask())
    assert sent[0]["status"] == 408


def test_a_body_in_pieces_is_bounded_as_one_that_says_its_length(tmp_path):
    pieces = []

    async def endless():
        while len(pieces) < 100:
            pieces.append(1)
            yield b"x" * 1024

    async def ask():
        with serving(tmp_path / "out", Paced(), started=False, max_body=4096) as service:
            before = everything(tmp_path)
            async with client(service) as http:
                answer = await http.post("/v1/videos", content=endless(), headers=JSON)
            assert everything(tmp_path) == before
            return answer, service

    answer, service = asyncio.run(ask())
    assert "content-length" not in answer.request.headers
    assert answer.status_code == 413
    assert len(pieces) < 20  # the rest was not waited for
    assert service.store.jobs() == []


def test_a_picture_that_no_job_takes_is_removed(tmp_path):
    """The queue is found full only after the picture was decoded."""

    async def ask():
        with serving(tmp_path / "out", Paced(), started=False, queue=1) as service:
            service.workers.refuse_if_full = lambda *_: None  # as if others came in between
            service.workers.submit = refuse
            before = everything(tmp_path / "out")
            async with client(service) as http:
                answer = await http.post(
                    "/v1/videos", data={"prompt": "x"}, files={"input_reference": png(8, 8)}
                )
            return answer, before

    def refuse(*_, **__):
        raise Refusal("queue_full", "full", retry_after=1)

    answer, before = asyncio.run(ask())
    assert answer.status_code == 429
    assert everything(tmp_path / "out") == before


def test_what_a_client_says_cannot_forge_a_line_of_the_log(tmp_path, caplog):
    async def ask():
        with serving(tmp_path / "out", Paced(), started=False) as service:
            async with client(service) as http:
                await http.get("/v1/%0a%1b[2JINFO forged")

    with caplog.at_level("INFO", logger="opensora.serve"):
        asyncio.run(ask())
    (line,) = [r.getMessage() for r in caplog.records if "forged" in r.getMessage()]
    assert line.isprintable()


def test_prompts_are_not_logged(tmp_path, caplog):
    async def ask():
        with serving(tmp_path / "out", Paced(free=True), started=False) as service:
            async with client(service) as http:
                await http.post("/v1/videos", json={"prompt": "a private wish"})

    with caplog.at_level("DEBUG"):
        asyncio.run(ask())
    assert "private" not in caplog.text
