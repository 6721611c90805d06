"""Plan: memory and time of a run from config.json alone, what fits, and the command line that is fastest.

python launch/plan.py --model_name_or_path meta-llama/Llama-2-70b-hf --device a100-80 --nodes 2 --gpus_per_node 8
python launch/plan.py --model_name_or_path Qwen/Qwen2.5-7B-Instruct --device_memory_gb 24 --gpus_per_node 1
"""

from taso_ds.entry import run_script
from taso_ds.interrupts import Interrupts


def _plan(_: Interrupts) -> str:
    from taso_ds.planning.arguments import parse_plan

    config, arguments, given = parse_plan(description=__doc__)
    from taso_ds.planning.forecast import make_forecast
    from taso_ds.planning.report_text import describe_forecast, write_forecast

    forecast = make_forecast(config, arguments, given)
    write_forecast(forecast, arguments)
    return describe_forecast(forecast)


def main() -> None:
    """Console entry point ``taso-plan``."""
    run_script(_plan, libraries_to_log=True)


if __name__ == "__main__":
    main()
