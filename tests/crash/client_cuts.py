"""A pull whose connection ends behind every byte of its first 64 KiB: what comes is right, or nothing.

    python -m tests.crash.client_cuts [--step 1]

Each offset twice: with the right length announced, and by chunks that end in the middle. The rest is asked for from
where the connection ended, and the whole is compared.
"""

import argparse
import random
import sys

from loraforge_registry.errors import RemoteError
from loraforge_registry.remotes import http
from tests.hostile_hub import TOKEN, running_hub

SIZE = 65_536
PATH = "/me/french/resolve/main/weights.bin"


def main(arguments=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--step", type=int, default=1)
    step = parser.parse_args(arguments).step
    http.PAUSES = (0.0,) * 3
    data = random.Random(1).randbytes(SIZE)
    wrong = resumed = refused = 0
    with running_hub() as hub:
        hub.add("me/french", {"weights.bin": data})
        client = http.Client(hub.url, TOKEN)
        for offset in range(0, SIZE, step):
            for cut in (_plain, _chunked):
                hub._spoilers.clear()
                hub.requests.clear()
                hub.spoil(PATH, lambda handler, cut=cut, at=offset: len(hub.requests) == 1 and cut(handler, data, at))
                try:
                    got = b"".join(map(bytes, client.body(PATH, SIZE)))
                except RemoteError:
                    refused += 1
                else:
                    resumed += len(hub.requests) == 2
                    wrong += got != data
    print(
        f"{SIZE // step} offsets, twice: {resumed} went on from where they were cut, {refused} refused, {wrong} wrong"
    )
    return 1 if wrong or refused or resumed != 2 * len(range(0, SIZE, step)) else 0


def _plain(handler, data, at):
    handler.reply(200, data[:at], {"Content-Length": str(len(data))})
    return True


def _chunked(handler, data, at):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    handler.wfile.write(b"%x\r\n%s" % (len(data), data[:at]))
    handler.close_connection = True
    return True


if __name__ == "__main__":
    sys.exit(main())
