"""llama.cpp's own server: `python engine.py MODEL.gguf` prints its address and serves until its input ends."""

import sys

import xllamacpp

ALIAS = "smollm2"


def main() -> None:
    params = xllamacpp.CommonParams()
    params.model.path, params.model_alias = sys.argv[1], {ALIAS}
    params.port, params.n_ctx, params.n_parallel = 0, 8192, 4
    # Idle threads of its own would poll for work while others' have some.
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
