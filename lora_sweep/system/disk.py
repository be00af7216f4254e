"""What a disk refuses, as an error of this package: the user's to mend, or a matter of room."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_sweep.errors import StorageUnavailable, StudyError
from lora_sweep.system import files


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """OSError and files.Unsafe become StudyError (rights, a link, something in the way) or StorageUnavailable.

    Args:
        path: the folder or file that is read or written, for the message.
    """
    try:
        yield
    except StorageUnavailable:
        raise
    except files.Unsafe as error:
        raise StudyError(f"{path}: {error}; move it away") from error
    except (PermissionError, FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        where = path if error.filename is None else error.filename
        raise StudyError(f"{where}: cannot be used for a study: {error.strerror}") from error
    except OSError as error:
        raise StorageUnavailable(
            f"{path}: cannot be written ({error.strerror or error}); make room, then launch again to resume"
        ) from error


def refuse_links(folder: Path) -> None:
    """Raises StudyError where a study's folder holds a link: what is written there would reach elsewhere.

    The folder itself may be reached through links. W&B makes links inside of wandb/, and Optuna's lock is one.
    """
    for link in files.links(folder):
        first, *rest = link.relative_to(folder).parts
        if not (first == "wandb" and rest) and not first.startswith("study.journal.lock"):
            raise StudyError(f"{link}: is a link, and a study's folder holds none; remove it, or put the file there")


def write_whole(path: Path, text: str) -> None:
    """Writes a file whole or not at all. Raises StudyError or StorageUnavailable where it cannot be written."""
    with disk_errors(path.parent):
        files.write_whole(path, text.encode())
