"""What a million prompts lean on: endpoints that are kept busy, and jobs that may be killed.

    python tests/benchmarks/cai_scale.py busy --requests 10000 --places 200 --seconds 2
    python tests/benchmarks/cai_scale.py kills --kills 20

`busy`: two loopback endpoints, each a process that works on `places` requests at a time; one is killed when half of
the requests are answered. Printed is the share of the places that were there in which an answer was made that counts:
what the killed one worked on is lost. Every row must be in the journal once.

`kills`: `recipes/cai.py` with a stub engine as generator and judge, as two jobs `shards=1/2` and `2/2` at one time,
which SIGKILL ends when so many answers as chance says are on disk, until `kills` have been; then the command without
`shards`. Compared with one run that nothing disturbed, byte by byte; and no answer may have been kept twice.
"""

import argparse
import asyncio
import json
import math
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rlhf_recipes.cai.backend import Journal, groups
from rlhf_recipes.cai.server import Server

ROOT = Path(__file__).parents[2]
WORDS = [first + second for first in "bdfgklmnprst" for second in ("ab", "elo", "iru", "ona", "ut", "yse", "ol")]
SMALL = (
    "constitution=clinic", "data.train_size=60", "data.eval_size=20", "gate.pairs=4", "gate.fails=ignore",
    "judging.principles_per_pair=1", "judging.prior_correction=false", "revise.few_shot=0", "revise.n_revisions=1",
    "filters.max_length_ratio=9", "shard_size=8",
)  # fmt: skip


def engines(count: int, function, *args) -> list[tuple]:
    """Processes with an endpoint each, its address, and a pipe with which it ends."""
    context, found = multiprocessing.get_context("spawn"), []
    for _ in range(count):
        pipe, far = context.Pipe()
        process = context.Process(target=function, args=(far, *args), daemon=True)
        process.start()
        found.append((process, f"http://127.0.0.1:{pipe.recv()}/v1", pipe))
    return found


def busy(count: int, places: int, seconds: float) -> None:
    import cai_server

    (bad, bad_url, bad_end), (good, good_url, good_end) = engines(2, cai_server.serve, places, seconds)
    server = Server(base_url=[bad_url, good_url], model="loopback", concurrency=places + places // 5)
    list(server.answer(cai_server.questions(4, "warm-up"), (), "warm-up"))  # the client imports late
    requests = cai_server.questions(count, "busy")
    _ = [request.key for request in requests]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "journal.jsonl"
        journal, killed = Journal(path), None
        begin, cpu = time.monotonic(), time.process_time()
        for group in server.answer(requests, (), "busy"):
            journal.write(group)
            if killed is None and len(journal.answers) >= count / 2:
                bad.kill()
                killed = time.monotonic() - begin
        wall, cpu = time.monotonic() - begin, time.process_time() - cpu
        rows = [entry["key"] for _, group in groups(path) for entry in group]
    good_end.send("end")
    worked = good_end.recv()  # as the endpoint measured its sleeping, which a busy machine makes longer
    good_end.close()
    bad_end.close()
    good.join()
    share = count * seconds / (places * (killed + wall))
    print(
        f"{count:,} requests of {seconds:g} s, two endpoints of {places} places, one killed after {killed:.1f} s: "
        f"{wall:.1f} s, busy {share:.1%}, the other one {worked / (places * wall):.1%} as it measured, "
        f"{1000 * cpu / count:.1f} ms of CPU each; {len(rows):,} rows, {len(rows) - len(set(rows))} of them twice, "
        f"load {os.getloadavg()[0]:.1f}"
    )


def answer(body: dict) -> dict:
    """What the stub engine says: words, or how much it likes A, by what it is asked alone."""
    rng = random.Random(json.dumps([body["messages"], body.get("seed")]))
    choice = {"index": 0, "finish_reason": "stop"}
    if body.get("logprobs"):
        a = rng.uniform(0.05, 0.95)
        listed = [{"token": name, "logprob": math.log(p)} for name, p in (("A", a), ("B", 0.99 - a)) if p > 0]
        first = max(listed, key=lambda each: each["logprob"])
        choice |= {"message": {"content": first["token"]}, "logprobs": {"content": [first | {"top_logprobs": listed}]}}
    else:
        choice["message"] = {"content": " ".join(rng.choice(WORDS) for _ in range(25)) + "."}
    usage = {"prompt_tokens": 50, "completion_tokens": 25}
    return {"model": body["model"], "choices": [choice], "usage": usage}


def serve(pipe, seconds: float) -> None:
    async def connection(reader, writer) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                size = int(head.split(b"content-length:")[1].split(b"\r\n")[0]) if b"content-length:" in head else 0
                body = await reader.readexactly(size)
                await asyncio.sleep(seconds)
                said = json.dumps(answer(json.loads(body)) if body else {"data": [{"id": "stub"}]}).encode()
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n")
                writer.write(b"Content-Length: %d\r\n\r\n%s" % (len(said), said))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def run() -> None:
        server = await asyncio.start_server(connection, "127.0.0.1", 0)
        pipe.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


def answers(folder: Path) -> list[str]:
    """Keys on disk, of a run or of a part of one."""
    paths = [*folder.glob("gate.jsonl"), *folder.glob("shards/*/answers.jsonl")]
    return [entry["key"] for path in paths for _, group in groups(path) for entry in group]


def kills(count: int, seed: int) -> None:
    ((engine, url, _),) = engines(1, serve, 0.02)
    command = [sys.executable, str(ROOT / "recipes" / "cai.py"), *SMALL]
    for role in ("generator", "judge"):
        command += [f"{role}=server", f"{role}.model=stub", f"{role}.base_url={url}"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder) / "outputs" / "cai"
        subprocess.run([*command, "run_name=whole"], cwd=folder, check=True, **quiet)
        whole, parts = len(answers(runs / "whole")), [runs / f"main.{k}-of-2" for k in (1, 2)]
        moments = sorted(rng.sample(range(2, whole // 2), count // 2))
        done = 0
        for moment in [*moments, None]:
            jobs = [subprocess.Popen([*command, f"shards={k}/2"], cwd=folder, **quiet) for k in (1, 2)]
            left = dict(zip(jobs, parts, strict=True)) if moment else {}
            while left:
                for job, part in list(left.items()):
                    if job.poll() is not None or len(answers(part)) >= moment:
                        job.kill()
                        del left[job]
                time.sleep(0.01)
            codes = [job.wait() for job in jobs]
            done += codes.count(-signal.SIGKILL)
        assert codes == [0, 0], codes
        subprocess.run(command, cwd=folder, check=True, **quiet)
        same = {}
        for path in (*sorted((runs / "whole").glob("*.parquet")), runs / "whole" / "funnel.json"):
            same[path.name] = path.read_bytes() == (runs / "main" / path.name).read_bytes()
        kept = answers(runs / "main")
        rows = json.loads((runs / "main" / "funnel.json").read_text())["written"]
    engine.kill()
    print(
        f"{done} kills at {moments} answers of a part, {sum(same.values())} of {len(same)} files the same, "
        f"{len(kept)} answers kept, {len(kept) - len(set(kept))} of them twice, {whole} without kills; rows {rows}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("busy", "kills"))
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--places", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.environ["NO_PROXY"] = "*"
    if args.part == "busy":
        busy(args.requests, args.places, args.seconds)
    else:
        kills(args.kills, args.seed)


if __name__ == "__main__":
    main()
