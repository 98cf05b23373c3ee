"""lmms-eval's command with our model and tasks: `python -m pixel_sail.vqa --tasks pixel_sail_mme --model_args ...`.

Takes all options of `lmms-eval`, also under `torchrun -m`.
"""

import sys


def main() -> int:
    """Run the kit's command, or exit with status 2 if it is not installed."""
    try:
        import lmms_eval.__main__ as kit
    except ModuleNotFoundError as error:
        print(f"{error}; install the kit with: pip install -e .[vqa] (best in a separate environment)", file=sys.stderr)
        return 2
    from pixel_sail.vqa.lmms_eval_plugin import register, with_default_options

    register()
    sys.argv = [sys.argv[0], *with_default_options(sys.argv[1:])]
    kit.cli_evaluate()
    return 0


if __name__ == "__main__":
    sys.exit(main())
