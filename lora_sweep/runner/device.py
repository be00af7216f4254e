"""The device with what is resident on it: the base, the data, the pack at work, and what is known of its memory."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_sweep.base.load import LoadedBase
from lora_sweep.base.load import load as load_base
from lora_sweep.config import Config, DataConfig, ModelConfig
from lora_sweep.data import Data, provenance
from lora_sweep.data import load as load_data
from lora_sweep.errors import UserError
from lora_sweep.pack import Capacity, Pack, PackOutOfMemory, Settings, Trial
from lora_sweep.records import BaselineLosses, Cell
from lora_sweep.system import files
from lora_sweep.system.disk import write_whole
from lora_sweep.system.memory import device_kind


@dataclass
class LoadedDevice:
    """A device with a base and data, loaded when first asked for."""

    device: torch.device
    folder: Path
    """Of the study: a base that no name reaches is written to its base/."""
    _model: tuple[ModelConfig, LoadedBase] | None = None
    _data: tuple[DataConfig, LoadedBase, Data] | None = None

    def base(self, model: ModelConfig) -> LoadedBase:
        if self._model is None or self._model[0] != model:
            self._model = self._data = None
            self._model = (model, load_base(model, self.device, self.folder))
        return self._model[1]

    def data(self, data: DataConfig, base: LoadedBase) -> Data:
        if self._data is None or self._data[0] != data or self._data[1] is not base:
            loaded = load_data(data, base.tokenizer)
            provenance.refuse_changed(self.folder, loaded.report.sources)
            provenance.keep(self.folder, loaded.report)
            self._data = (data, base, loaded)
        return self._data[2]

    @contextmanager
    def pack(self, config: Config, bank_rank: int) -> Iterator[tuple[Pack, BaselineLosses]]:
        """A pack for trials of this configuration's kind, and the losses of its base."""
        loaded = self.base(config.model)
        settings = Settings.of(Trial.of(Cell(0), config))
        kind = f"{config.model} {config.data} {settings} {device_kind(self.device)}"
        cache = CapacityCache(self.folder / "capacity.json", kind)
        pack = Pack(loaded, self.data(config.data, loaded), settings, bank_rank, cache.too_many, cache.fits)
        try:
            try:
                measured = pack.evaluate_base()
            except torch.OutOfMemoryError as error:
                raise UserError(
                    "train.eval_batch_size: an evaluation of the base alone does not fit into the device's memory; "
                    "lower it or data.max_length"
                ) from error
            yield pack, measured
            cache.keep(pack.capacity)
        except PackOutOfMemory as error:
            cache.keep(pack.capacity)
            raise UserError(
                f"train.slots: {error.slots} trials do not fit into the device's memory; lower train.batch_size or "
                "data.max_length, or set train.gradient_checkpointing=true"
            ) from error
        finally:
            pack.close()


@dataclass
class CapacityCache:
    """What an earlier pack of the same kind has found out about the device's memory."""

    file: Path
    kind: str

    @property
    def too_many(self) -> int | None:
        """The smallest number of slots a pass that ran out of memory."""
        value = self._all().get(self._key, {}).get("too_wide")
        return value if isinstance(value, int) and value > 0 else None

    @property
    def fits(self) -> int:
        """The largest number below that whose passes went through."""
        value = self._all().get(self._key, {}).get("fits", 0)
        return value if isinstance(value, int) and value > 0 else 0

    def keep(self, capacity: Capacity) -> None:
        if not capacity.measured and capacity.too_many is None:
            return
        stored = {"too_wide": capacity.too_many, "fits": capacity.fits}
        measured = {"slots": capacity.slots, "reason": capacity.reason} | stored
        write_whole(self.file, json.dumps(self._all() | {self._key: measured}, indent=2) + "\n")

    @property
    def _key(self) -> str:
        return hashlib.sha256(self.kind.encode()).hexdigest()[:12]

    def _all(self) -> dict[str, dict[str, Any]]:
        """A cache: one that cannot be read is made anew."""
        try:
            stored = files.read_json(self.file, follow=False)
        except (OSError, files.Unsafe):
            return {}
        return {key: each for key, each in stored.items() if isinstance(each, dict)} if isinstance(stored, dict) else {}
