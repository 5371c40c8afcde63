"""`python -m dsv4_eqx.checkpoint`: look into a checkpoint, or write it another way."""

import argparse
import sys
from collections.abc import Sequence

from dsv4_eqx.checkpoint.describe import describe
from dsv4_eqx.checkpoint.save import MOST_FILE_BYTES, convert
from dsv4_eqx.sharding.mesh import mesh_sizes

_REVISION = "branch, tag or commit, if the checkpoint is on the Hugging Face hub"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; the exit code is 1 if something is wrong with a checkpoint."""
    options = _parser().parse_args(arguments)
    try:
        if options.command == "inspect":
            sizes = None if options.mesh is None else mesh_sizes(options.mesh)
            text, is_good = describe(options.checkpoint, sizes, options.revision)
            print(text)
            return 0 if is_good else 1
        convert(
            options.checkpoint,
            options.target,
            dtype=options.dtype,
            official=options.official,
            overwrite=options.overwrite,
            most_file_bytes=options.most_file_bytes,
            revision=options.revision,
        )
    except (ValueError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m dsv4_eqx.checkpoint")
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser(
        "inspect", help="what is in a checkpoint, and what is missing or too much"
    )
    inspect.add_argument(
        "--mesh", help="data=8,expert=64: does it fit, bytes per device"
    )
    write = commands.add_parser(
        "convert",
        help="write its weights as arrays, under other names; small files beside them, "
        "as a tokenizer, are copied",
    )
    for command in (inspect, write):
        command.add_argument("checkpoint", help="a directory, or a name on the hub")
        command.add_argument("--revision", help=_REVISION)
    write.add_argument("target", help="the directory to write")
    write.add_argument("--dtype", help="of the weights; the embedding's by default")
    write.add_argument(
        "--official", action="store_true", help="DeepSeek's names, not Hugging Face's"
    )
    write.add_argument(
        "--overwrite", action="store_true", help="replace a checkpoint that is there"
    )
    write.add_argument("--most-file-bytes", type=int, default=MOST_FILE_BYTES)
    return parser


if __name__ == "__main__":
    sys.exit(main())
