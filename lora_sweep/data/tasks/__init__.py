"""The embedded and the real tasks: what needs no files."""

from lora_sweep.config import DataConfig
from lora_sweep.data.tasks import biographies as world
from lora_sweep.data.tasks import real_facts
from lora_sweep.errors import ConfigError, Fault


def task(data: DataConfig) -> world.Task:
    """The task that data.name says, of data.subjects subjects. Raises ConfigError."""
    if data.subjects is None:
        raise ConfigError([Fault("data.subjects", "is needed by this task")])
    try:
        if data.name == "facts":
            return world.facts(data.subjects, data.seed)
        if data.name == "real_facts":
            return real_facts.facts(data.subjects, data.seed)
        return world.style(data.subjects, data.eval_size or data.subjects, data.seed)
    except ValueError as error:
        raise ConfigError([Fault("data.subjects", str(error))]) from error
    except ModuleNotFoundError as error:
        rule = f"{data.name} needs the package {error.name}"
        raise ConfigError([Fault("data", rule, None, 'pip install "lora-sweep[real]"')]) from error
