"""Opening adapter directories and files without leaving the root, following a link or waiting on a pipe."""

from __future__ import annotations

import errno
import io
import os
import stat
from pathlib import Path
from types import TracebackType

from fusionserve.adapters.artifact_errors import quoted
from fusionserve.errors import ArtifactError, FusionServeError, NotFoundError, UnavailableError
from fusionserve.failpoints import reach_failpoint
from fusionserve.limits import MAX_PATH_PARTS, is_name

_DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE_FLAGS = (
    os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
)  # non-blocking: a pipe must not hang us


class ArtifactDirectory:
    """An open directory; files are reached through its descriptor, so swapping its path changes nothing."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def has_file(self, name: str) -> bool:
        """True if there is an entry `name` of any kind."""
        try:
            os.stat(name, dir_fd=self._descriptor, follow_symlinks=False)
        except OSError:
            return False
        return True

    def open_file(self, name: str, *, missing_reason: str) -> io.FileIO:
        """Opens the regular file `name`, unbuffered.

        Raises ArtifactError: `missing_reason` if there is none, ADAPTER_PATH_ESCAPE if it is a link,
        NOT_A_REGULAR_FILE, PERMISSION_DENIED. Raises UnavailableError if the storage fails.
        """
        try:
            reach_failpoint("artifact.open")
            descriptor = os.open(name, _FILE_FLAGS, dir_fd=self._descriptor)
        except FileNotFoundError:
            raise ArtifactError(f"there is no {name}", reason=missing_reason) from None
        except OSError as error:
            raise _to_error(error, name) from None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise _not_a_file(name)
        return io.FileIO(descriptor, "rb")

    def close(self) -> None:
        """Closes the descriptor; files opened from it stay open."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> ArtifactDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_artifact_directory(root: Path, name: str) -> ArtifactDirectory:
    """Opens the directory `name`, or the relative path "folder/name", under `root`; the caller closes it.

    Raises NotFoundError if there is none, ArtifactError (ADAPTER_PATH_ESCAPE) if the path is absolute, has
    `..` or passes through a link, and what a failing disk raises.
    """
    parts = _split_path(name)
    directory = open_directory(root)
    for part in parts:
        with directory:  # closed on every way out; the next one is open by then
            directory = ArtifactDirectory(_open_child(directory._descriptor, part, name))
    return directory


def open_directory(path: Path) -> ArtifactDirectory:
    """Opens a directory that the operator named, so links to it are followed; the caller closes it.

    Raises NotFoundError if there is none.
    """
    try:
        return ArtifactDirectory(os.open(path, _DIRECTORY_FLAGS & ~os.O_NOFOLLOW))
    except (FileNotFoundError, NotADirectoryError):
        raise _no_directory("") from None
    except OSError as error:
        raise _to_error(error, "the directory") from None


def list_artifact_names(root: Path, config_file: str) -> tuple[str, ...]:
    """The sorted names of the directories in `root` that have a valid name and a configuration file.

    Raises NotFoundError or UnavailableError if `root` cannot be read.
    """
    with open_directory(root) as directory:
        try:
            entries = list(os.scandir(directory._descriptor))
        except OSError as error:
            raise _to_error(error, "the directory") from None
        return tuple(
            sorted(
                entry.name for entry in entries if _may_be_artifact(entry, directory._descriptor, config_file)
            )
        )


def _may_be_artifact(entry: os.DirEntry[str], root_descriptor: int, config_file: str) -> bool:
    if not is_name(entry.name):
        return False
    try:
        if not entry.is_dir(follow_symlinks=False):
            return False
        config = os.stat(f"{entry.name}/{config_file}", dir_fd=root_descriptor, follow_symlinks=False)
    except OSError:
        return False
    return stat.S_ISREG(config.st_mode)


def _split_path(name: str) -> list[str]:
    parts = name.split("/")
    unsafe = any(part in ("", ".", "..") or "\\" in part or not part.isprintable() for part in parts)
    if unsafe or len(parts) > MAX_PATH_PARTS:
        raise _escape(quoted(name))
    return parts


def _open_child(parent_descriptor: int, part: str, name: str) -> int:
    try:
        return os.open(part, _DIRECTORY_FLAGS, dir_fd=parent_descriptor)
    except FileNotFoundError:
        raise _no_directory(name) from None
    except OSError as error:
        # A link opened as a directory is ELOOP on some systems and ENOTDIR on others.
        if error.errno in (errno.ELOOP, errno.ENOTDIR) and _is_link(parent_descriptor, part):
            raise _escape(quoted(name)) from None
        if error.errno in (errno.ENOTDIR, errno.ENAMETOOLONG):
            raise _no_directory(name) from None
        raise _to_error(error, "the directory") from None


def _is_link(parent_descriptor: int, part: str) -> bool:
    try:
        return stat.S_ISLNK(os.stat(part, dir_fd=parent_descriptor, follow_symlinks=False).st_mode)
    except OSError:
        return False


def _to_error(error: OSError, what: str) -> FusionServeError:
    """An OSError's own text names the path, so none of it is passed on."""
    if error.errno == errno.ELOOP:
        return _escape(what)
    if error.errno in (errno.EACCES, errno.EPERM):
        return ArtifactError(f"{what} may not be read by the server", reason="PERMISSION_DENIED")
    if error.errno in (errno.ENXIO, errno.EISDIR, errno.ENODEV):
        return _not_a_file(what)
    return UnavailableError(f"{what} could not be read from storage", reason="STORAGE_UNAVAILABLE")


def _not_a_file(what: str) -> ArtifactError:
    return ArtifactError(f"{what} is not a regular file", reason="NOT_A_REGULAR_FILE")


def _no_directory(name: str) -> NotFoundError:
    return NotFoundError(
        "there is no such adapter directory",
        resource_type="adapter",
        resource_name=name,
        reason="ADAPTER_NOT_FOUND",
    )


def _escape(what: str) -> ArtifactError:
    return ArtifactError(f"{what} is a link or leads out of its root folder", reason="ADAPTER_PATH_ESCAPE")
