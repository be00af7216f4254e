import mmap
import sys

from lora_sweep.system.out_of_memory import is_at_limit, is_out_of_memory
from lora_sweep.system.process import run

_OUT_OF_MEMORY = (
    "there is not enough memory for this; free some, take fewer train.slots or model.dtype=bf16; what was recorded is "
    "safe, the same command goes on"
)
_RESERVE_BYTES = 8 * 2**20
"""Address space (no page of it is touched) that is given back to say that there is none left."""


def main() -> None:
    """Runs the program as this process; nothing else is imported before its signals have handlers."""
    run(verb, goes_on=("launch", "train"))


def verb() -> None:
    """Runs the verb that sys.argv names and ends in SystemExit; memory that runs out anywhere is one line."""
    reserve = mmap.mmap(-1, _RESERVE_BYTES)
    try:
        from lora_sweep.cli import main as cli

        cli.main()
    except Exception as error:
        reserve.close()
        if not (is_out_of_memory(error) or is_at_limit()):
            raise
        print(_OUT_OF_MEMORY, file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
