"""Reading a form: small, urlencoded, in time, or not at all."""

import asyncio
from urllib.parse import parse_qsl

from starlette.exceptions import HTTPException
from starlette.requests import Request

BODY_BYTES_MAX = 16 * 1024
FIELDS_MAX = 8
READ_TIMEOUT_S = 10
CONTENT_TYPE = "application/x-www-form-urlencoded"


async def read_form(request: Request) -> dict[str, str]:
    """The form's fields; of a repeated field the last one. Raises HTTPException 400, 408, 413 or 415."""
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != CONTENT_TYPE:
        raise HTTPException(415, "Forms are sent as application/x-www-form-urlencoded.")
    body = bytearray()
    try:
        async with asyncio.timeout(READ_TIMEOUT_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > BODY_BYTES_MAX:
                    raise HTTPException(413, "This form is too large.")
    except TimeoutError:
        raise HTTPException(408, "The form did not arrive in time.") from None
    try:
        text = body.decode("utf-8")
        return dict(parse_qsl(text, keep_blank_values=True, max_num_fields=FIELDS_MAX, errors="strict"))
    except ValueError:  # UnicodeDecodeError, too many fields
        raise HTTPException(400, "This form cannot be read.") from None
