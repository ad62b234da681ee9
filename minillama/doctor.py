"""`python -m minillama.doctor`: what this machine has, and whether it computes the right numbers.

A small model and every op run on the chosen device, and with the reference formulas on the CPU. The
exit code is 1 if a result is wrong. self_test.py has the checks. It imports torch, and so comes
after `threads.prepare_environment`, as in the scripts."""

import sys

from minillama import cli, threads
from minillama.train_config import DEVICES, PRECISIONS


def main(arguments: list[str]) -> int:
    parser = cli.Parser(
        prog="minillama.doctor",
        description=__doc__,
        usage="python -m minillama.doctor [--device NAME] [--dtype NAME]",
    )
    add = parser.add_argument
    add("--device", default="auto", choices=DEVICES, help="[auto]")
    add("--dtype", default="float32", choices=tuple(PRECISIONS), help="[float32]")
    add("--ops", default="", metavar="NAME", help="implementations of the ops, as MINILLAMA_OPS")
    options = parser.parse_args(arguments)
    from minillama import self_test

    return self_test.run(options.device, options.dtype, options.ops)


if __name__ == "__main__":
    threads.prepare_environment()
    cli.run(main, sys.argv[1:])
