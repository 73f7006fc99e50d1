"""torchrun whose own options cannot be abbreviated, so that `--m` after a script's name is the script's.

A signal, Ctrl-C for one, ends it with 128 + its number once the ranks have ended, and without torchrun's traceback.

    python tools/torchrun.py --nproc-per-node 2 local_aggregation.py --arch resnet18 --H 10 --m 30000

Some versions of Python, 3.11 among them, take `--m` wherever it stands for a short form of torchrun's --master-port,
--max-restarts and others, and call it ambiguous. `make install` puts this file in the place of .venv/bin/torchrun.
"""

from collections.abc import Sequence

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException


def main(argv: Sequence[str] | None = None) -> None:
    parser = run.get_args_parser()
    parser.allow_abbrev = False
    run.get_args_parser = lambda: parser
    try:
        run.main(argv)
    except SignalException as error:
        raise SystemExit(128 + error.sigval) from None


if __name__ == "__main__":
    main()
