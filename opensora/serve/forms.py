"""The body of POST /v1/videos -> fields and an uploaded picture, from JSON or a multipart form."""

from __future__ import annotations

from typing import Any

from opensora.errors import require
from opensora.serve.refusals import Refusal, quoted
from opensora.serve.request import parse_json
from opensora.serve.uploads import PARAM

_MAX_FIELDS = 20
_MAX_FIELD_BYTES = 64 * 1024


async def read(request: Any) -> tuple[dict[str, Any], bytes | None]:
    """Fields by name, and the bytes of `input_reference` where there is one.

    Args:
        request: a `starlette.requests.Request` whose body is bounded already.

    Raises:
        Refusal: the body is of another type, or is not what its type says.
    """
    kind, _, options = request.headers.get("content-type", "").lower().partition(";")
    kind, charset = kind.strip(), options.partition("charset=")[2].partition(";")[0].strip('" ')
    if charset not in ("", "utf-8", "utf8"):
        raise Refusal("unsupported_media_type", "send text as utf-8")
    if kind == "application/json":
        tree = parse_json(await request.body())
        if PARAM in tree:
            raise Refusal(
                "invalid_value",
                "`input_reference` is uploaded in a multipart form; the server opens no path "
                "and no URL",
                param=PARAM,
            )
        return tree, None
    if kind == "multipart/form-data":
        return await _multipart(request)
    raise Refusal(
        "unsupported_media_type", "send application/json, or multipart/form-data with a picture"
    )


async def _multipart(request: Any) -> tuple[dict[str, Any], bytes | None]:
    require("python_multipart", extra="serve", purpose="an upload")
    from starlette.datastructures import UploadFile
    from starlette.formparsers import MultiPartException, MultiPartParser

    parser = MultiPartParser(
        request.headers,
        request.stream(),
        max_files=1,
        max_fields=_MAX_FIELDS,
        max_part_size=_MAX_FIELD_BYTES,
    )
    parser.spool_max_size = 2**40  # in memory: the body is bounded, and no other folder is written
    try:
        form = await parser.parse()
    except (MultiPartException, LookupError, ValueError) as error:
        reason = quoted(getattr(error, "message", error), 120)
        raise Refusal("invalid_multipart", f"the form cannot be read: {reason}") from None
    fields: dict[str, Any] = {}
    picture: bytes | None = None
    try:
        for name, value in form.multi_items():
            if name in fields or (name == PARAM and picture is not None):
                raise Refusal("invalid_multipart", f"the field `{quoted(name)}` comes twice")
            if isinstance(value, UploadFile):
                if name != PARAM:
                    raise Refusal(
                        "unknown_field", f"a file comes as `{PARAM}`, not as `{quoted(name)}`",
                        param=quoted(name),
                    )  # fmt: skip
                picture = await value.read()
            elif name == PARAM:
                raise Refusal(
                    "invalid_value",
                    "`input_reference` is a file; the server opens no path and no URL",
                    param=PARAM,
                )
            else:
                fields[name] = value
    finally:
        await form.close()
    return fields, picture
