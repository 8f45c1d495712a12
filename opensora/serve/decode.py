"""The process that decodes an upload: its arguments are picture, output, pixels, seconds, bytes.

It gives up what it does not need before it looks at the first byte: memory, time, and every other
file. Exit codes: 0 written as PNG, 65 refused with a line on stderr, anything else died.
"""

from __future__ import annotations

import math
import resource
import sys


def confine(seconds: float, num_bytes: int) -> None:
    """Bound this process: CPU seconds, address space, size and number of files, no core dump."""
    limits = {
        resource.RLIMIT_CPU: math.ceil(seconds),
        resource.RLIMIT_AS: num_bytes,
        resource.RLIMIT_FSIZE: num_bytes,
        resource.RLIMIT_NOFILE: 32,
        resource.RLIMIT_CORE: 0,
    }
    for kind, wanted in limits.items():
        _, hard = resource.getrlimit(kind)
        value = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        # macOS has no limit of the address space; the others hold there too.
        if kind != resource.RLIMIT_AS or sys.platform != "darwin":
            resource.setrlimit(kind, (value, value))


def main(source: str, target: str, max_pixels: str, seconds: str, num_bytes: str) -> int:
    """Decode a picture within bounds and write it anew, so that nothing of its file remains."""
    from opensora.errors import OpensoraError
    from opensora.media.picture import read_picture
    from opensora.media.source import Limits
    from opensora.media.write import write_image

    confine(float(seconds), int(num_bytes))
    try:
        limits = Limits(max_pixels_per_frame=int(max_pixels))
        write_image(target, read_picture(source, limits=limits))
    except OpensoraError as error:
        print(str(error).replace(f"'{source}'", "the picture"), file=sys.stderr)
        return 65
    except MemoryError:
        print("the picture needs more memory than an upload may take", file=sys.stderr)
        return 65
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
