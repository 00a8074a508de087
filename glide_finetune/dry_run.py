"""--dry_run: what a run would meet, told in sections after the settings. Nothing is trained."""

from glide_finetune import demo
from glide_finetune.config import TrainConfig
from glide_finetune.cost_report import report_cost
from glide_finetune.data_report import report_data


def dry_run(config: TrainConfig) -> None:
    """Print the sections, each of which may take a while. The demo's data is drawn if need be.

    Raises:
        ValueError, OSError: why training would stop, in one line.
        OutOfMemory: a step does not fit.
    """
    if config.demo:
        demo.prepare(config)
    report_data(config)
    report_cost(config)
