"""How busy the server backend keeps an endpoint.

    python tests/benchmarks/cai_server.py --requests 1000 --places 16 --concurrency 16 20 24 --rounds 5

A loopback endpoint in a process of its own works on `places` requests at a time, `milliseconds` for each; further ones
wait there, as they do in vLLM's queue. Printed is requests * milliseconds / (places * wall), the share of the time in
which the endpoint works: from the call, with keys hashed, to the last answer in the journal. Beside it the same with
the seconds that the endpoint measured for its own sleeping, which a busy machine makes longer. The backend has
`concurrency` requests in flight. In turn, as what the machine allows: `places` threads that send the same messages
with http.client and do nothing else.
"""

import argparse
import asyncio
import http.client
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import threading
import time
from pathlib import Path

from rlhf_recipes.cai.backend import Journal, Request, ask
from rlhf_recipes.cai.server import Server

REPLY = {
    "id": "1",
    "object": "chat.completion",
    "created": 1,
    "model": "loopback",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "word " * 100}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 200, "completion_tokens": 100, "total_tokens": 300},
}


def serve(pipe, places: int, seconds: float) -> None:
    """The endpoint: sends its port, then for each message the seconds it worked since the last."""
    asyncio.run(_serve(pipe, places, seconds))


async def _serve(pipe, places: int, seconds: float) -> None:
    body = json.dumps(REPLY).encode()
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    slots, worked = asyncio.Semaphore(places), 0.0

    async def connection(reader, writer) -> None:
        nonlocal worked
        try:
            while True:
                headers = (await reader.readuntil(b"\r\n\r\n")).lower()
                await reader.readexactly(int(headers.split(b"content-length:")[1].split(b"\r\n")[0]))
                async with slots:
                    begin = time.monotonic()
                    await asyncio.sleep(seconds)
                    worked += time.monotonic() - begin
                writer.write(head + body)
                await writer.drain()
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(connection, "127.0.0.1", 0)
    pipe.send(server.sockets[0].getsockname()[1])
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()

    def report() -> None:
        nonlocal worked
        try:
            pipe.recv()
            pipe.send(worked)
            worked = 0.0
        except EOFError:
            loop.remove_reader(pipe.fileno())
            ended.set()

    loop.add_reader(pipe.fileno(), report)
    await ended.wait()


def bare(port: int, requests: list[Request], concurrency: int) -> None:
    """What costs least: a connection per thread, no library."""
    bodies = iter([json.dumps({"model": "loopback", "messages": request.messages}) for request in requests])
    lock = threading.Lock()

    def work() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        while True:
            with lock:
                body = next(bodies, None)
            if body is None:
                return connection.close()
            connection.request("POST", "/v1/chat/completions", body)
            json.loads(connection.getresponse().read())

    threads = [threading.Thread(target=work) for _ in range(concurrency)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def questions(count: int, group: str) -> list[Request]:
    text = "word " * 150
    return [
        Request(f"p{i}", "answer", [{"role": "user", "content": f"{group} {i} {text}"}], max_new_tokens=200)
        for i in range(count)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--places", type=int, default=16)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[16, 20, 24])
    parser.add_argument("--milliseconds", type=float, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    os.environ["NO_PROXY"] = "*"
    context = multiprocessing.get_context("spawn")
    pipe, far = context.Pipe()
    process = context.Process(target=serve, args=(far, args.places, args.milliseconds / 1000), daemon=True)
    process.start()
    far.close()
    port = pipe.recv()
    url = f"http://127.0.0.1:{port}/v1"
    backends = {
        f"backend, {count} in flight": Server(base_url=url, model="loopback", concurrency=count)
        for count in args.concurrency
    }

    shares = {name: [] for name in (*backends, f"http.client, {args.places} in flight")}
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(Path(folder) / "journal.jsonl")
        for name, backend in backends.items():  # the client imports late
            ask(backend, questions(args.places, f"warm-up of {name}"), journal, "warm-up")
        for number in range(1, args.rounds + 1):
            for name, ours in shares.items():
                asked = questions(args.requests, f"{name} {number}")
                _ = [request.key for request in asked]  # hashed before anything is sent
                pipe.send("begin")
                pipe.recv()
                begin, cpu = time.monotonic(), time.process_time()
                if name in backends:
                    ask(backends[name], asked, journal, f"round {number}")
                else:
                    bare(port, asked, args.places)
                wall, cpu = time.monotonic() - begin, time.process_time() - cpu
                pipe.send("end")
                ours.append(args.requests * args.milliseconds / 1000 / (args.places * wall))
                print(
                    f"round {number}, {name}: {wall:.2f} s, busy {ours[-1]:.1%} (as the endpoint measured it: "
                    f"{pipe.recv() / (args.places * wall):.1%}), {1000 * cpu / args.requests:.2f} ms of CPU each"
                )
    pipe.close()
    process.join(10)
    print(f"{args.requests} requests, {args.places} places, {args.milliseconds:g} ms each; medians:")
    for name, ours in shares.items():
        print(f"{name}: busy {statistics.median(ours):.1%} ({min(ours):.1%} to {max(ours):.1%} of {args.rounds})")
    print(f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}, Python {platform.python_version()}")


if __name__ == "__main__":
    main()
